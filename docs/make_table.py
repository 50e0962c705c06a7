"""Makes docs/methods/README.md, the tables of all methods, from their cards: ``python docs/make_table.py``.

A card begins with its facts, as YAML between two lines of ``---``: its ``family``, what it is ``for`` in a few words,
whether it needs a ``metric``, how many ``copies`` of the weights it keeps beside the model's own, the ``strategies`` it
works under, what was ``measured`` (contestants by comparison, see ``measured.py``) and the ``import``.
"""

from pathlib import Path
from typing import Any

import yaml
from measured import as_difference, comparisons, verdict

METHODS = Path(__file__).parent / "methods"
TABLE = METHODS / "README.md"
FACTS = ("family", "for", "metric", "copies", "strategies", "measured", "import")
FAMILIES = {
    "Averages along a run": "One run; weights are averaged on the way, by a formula. Nothing about training changes.",
    "Averages chosen by a score": "One run; what goes into the average is chosen by validation, or trained.",
    "After training": "Weights that are there already, of one run or several, become one model.",
    "Branches": "Several sets of weights train side by side and are mixed on the way.",
    "Every update": "Each step of the optimizer is merged with what an earlier fine-tuning had changed.",
    "Tasks in turn": "Tasks arrive one after the other; after each, the model is the merge of all so far.",
}
"""The families of cards, in the order of the navigation."""

HEAD = """\
# All methods

[Five questions](../choose.md) lead to a family. *Metric*: whether it needs a validation metric. *Copies*: sets of
weights it keeps beside the model's own. *In our measurements*: whether the 95 % interval of the gain lies
above zero in all our settings, in some (*conditional*), or in none (*does not*); the settings are small, and listed
[below](#what-we-measured).

*Made from the cards and `benchmarks/results` by `python docs/make_table.py`: change those, not this page.*
"""
COLUMNS = ("method", "for", "in our measurements", "metric", "copies", "beyond one device")
MEASURED = """
## What we measured

Differences of accuracy on held-out data, in points, with [±](../glossary.md#plus-minus) over seeds.

"""


def cards() -> list[Path]:
    return [path for path in sorted(METHODS.glob("*.md")) if path != TABLE]


def families() -> dict[str, list[Path]]:
    """The cards of each family.

    Raises:
        ValueError: If a card is of no family.
    """
    found: dict[str, list[Path]] = {family: [] for family in FAMILIES}
    for card in cards():
        family = parts(card)[0]["family"]
        if family not in found:
            raise ValueError(f"`family` of {card.name} must be one of {', '.join(FAMILIES)}, got {family}.")
        found[family].append(card)
    return found


def table() -> str:
    """The whole page."""
    page = HEAD
    for family, of_family in families().items():
        picture = f"![{family}: what is merged when](../pictures/{slug(family)}.svg)"
        page += f"\n## {family}\n\n{FAMILIES[family]}\n\n{picture}\n\n{as_table(COLUMNS, map(_row, of_family))}"
    measured = [row for card in cards() for row in _measured(card)]
    return page + MEASURED + as_table(("method", "setting", "beside", "points"), measured)


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


def slug(family: str) -> str:
    return family.lower().replace(" ", "-")


def _row(card: Path) -> tuple[str, ...]:
    facts, _ = parts(card)
    strategies = ", ".join(each for each in facts["strategies"] if each != "one device")
    return (_link(card), facts["for"], verdict(facts["measured"]), facts["metric"], facts["copies"], strategies)


def _measured(card: Path) -> list[tuple[str, ...]]:
    found = []
    for name, contestants in parts(card)[0]["measured"].items():
        each = comparisons()[name]
        for one in contestants:
            setting = each.title if one.lower() == short_title(card).lower() else f"{each.title}: {one}"
            points = as_difference(*each.difference(one), each.digits)
            found.append((_link(card), setting, each.beside, points))
    return found


def _link(card: Path) -> str:
    return f"[{short_title(card)}]({card.name})"


def as_table(columns: tuple[str, ...], rows: Any) -> str:
    """Rows of cells in Markdown."""
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ("---",) * len(columns), *rows])


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(f"{TABLE}: {len(cards())} methods")
