"""Makes docs/methods/README.md, the table of all methods, from their cards: ``python docs/make_table.py``.

A card begins with its facts, as YAML between two lines of ``---``: its ``family``, ``when`` and ``when not`` to use the
method, whether it needs a ``metric``, its ``cost``, what becomes of ``buffers``, the ``strategies`` it works under, the
``result`` that we measured and the ``import``.
"""

from pathlib import Path
from typing import Any

import yaml

METHODS = Path(__file__).parent / "methods"
TABLE = METHODS / "README.md"
FACTS = ("family", "when", "when not", "metric", "cost", "buffers", "strategies", "result", "import")

FAMILIES = (
    "Averages along a run",
    "Averages chosen by a score",
    "After training",
    "Branches",
    "Every update",
    "Tasks in turn",
)

HEAD = """\
# All methods

Made from the cards by `python docs/make_table.py`; change a card, not this page. A card has the formula, an example,
the settings that matter and the reference. Which test shows a strategy is in [several devices](../strategies.md).

"""
WHEN = ("method", "use it", "do not use it", "measured")
TAKES = ("method", "needs a metric", "cost", "BatchNorm and buffers", "strategies", "import")


def cards() -> list[Path]:
    return [path for path in sorted(METHODS.glob("*.md")) if path != TABLE]


def families() -> dict[str, list[Path]]:
    """The cards of each family."""
    found: dict[str, list[Path]] = {family: [] for family in FAMILIES}
    for card in cards():
        family = parts(card)[0]["family"]
        if family not in found:
            raise ValueError(f"`family` of {card.name} must be one of {', '.join(FAMILIES)}, got {family}.")
        found[family].append(card)
    return found


def table() -> str:
    """The whole page."""
    read = {path.name: parts(path) for path in cards()}
    when = [
        (_link(name, title(text)), *_cells(facts, FACTS[1:3]), facts["result"]) for name, (facts, text) in read.items()
    ]
    takes = [
        (
            _link(name, title(text).partition(":")[0]),
            *_cells(facts, FACTS[3:6]),
            ", ".join(facts["strategies"]),
            f"`{facts['import']}`",
        )
        for name, (facts, text) in read.items()
    ]
    return f"{HEAD}## Which one\n\n{_table(WHEN, when)}\n## What it takes\n\n{_table(TAKES, takes)}"


def parts(card: Path) -> tuple[dict[str, Any], str]:
    """The facts at the top of a card, and the page below them.

    Raises:
        ValueError: If a fact is missing, or one is there that no table shows.
    """
    _, facts, text = card.read_text(encoding="utf-8").split("---\n", 2)
    found: dict[str, Any] = yaml.safe_load(facts)
    if set(found) != set(FACTS):
        raise ValueError(f"{card.name} must begin with {', '.join(FACTS)}, got {', '.join(found)}.")
    return found, text


def title(text: str) -> str:
    return text.lstrip().splitlines()[0].removeprefix("# ")


def short_title(card: Path) -> str:
    """What a card is called in the navigation: its title up to the colon."""
    return title(parts(card)[1]).partition(":")[0]


def _cells(facts: dict[str, Any], names: tuple[str, ...]) -> list[str]:
    return [facts[name].replace("|", "\\|") for name in names]


def _link(name: str, text: str) -> str:
    return f"[{text}]({name})"


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ("---",) * len(columns), *rows])


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(f"{TABLE}: {len(cards())} methods")
