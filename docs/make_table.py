"""Makes docs/methods/README.md, the table of all methods, from their cards: ``python docs/make_table.py``."""

import re
from pathlib import Path

METHODS = Path(__file__).parent / "methods"
TABLE = METHODS / "README.md"

HEAD = """\
# All methods

Made from the cards by `python docs/make_table.py`; change a card, not this page. A card has the formula, an example,
the settings that matter and the reference.

"""
WHEN = ("method", "use it", "do not use it", "measured")
TAKES = ("method", "needs a metric", "cost", "BatchNorm and buffers", "strategies", "import")


def cards() -> list[Path]:
    return [path for path in sorted(METHODS.glob("*.md")) if path != TABLE]


def table() -> str:
    """The whole page."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in cards()}
    return (
        HEAD
        + "## Which one\n\n"
        + _table(WHEN, [_when(name, card) for name, card in texts.items()])
        + "\n## What it takes\n\n"
        + _table(TAKES, [_takes(name, card) for name, card in texts.items()])
    )


def _table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in [columns, ("---",) * len(columns), *rows])


def _when(name: str, card: str) -> tuple[str, ...]:
    return (
        f"[{card.splitlines()[0].removeprefix('# ')}]({name})",
        _paragraph(card, "Use it"),
        _paragraph(card, "Do not use it"),
        _measured(card),
    )


def _takes(name: str, card: str) -> tuple[str, ...]:
    imported = re.search(r"^from (lightning_merge[\w.]*) import (.+)$", card, flags=re.MULTILINE)
    snippet = re.search(r"```python\n(.*?)```", card, flags=re.DOTALL)
    return (
        f"[{card.splitlines()[0].removeprefix('# ').partition(':')[0]}]({name})",
        "yes" if snippet and "monitor=" in snippet[1] else "no",
        _paragraph(card, "Cost"),
        _paragraph(card, "Buffers"),
        _strategies(_paragraph(card, "Does not combine with", whole=True)),
        f"`from {imported[1]} import {imported[2]}`" if imported else "",
    )


def _paragraph(card: str, heading: str, whole: bool = False) -> str:
    """What follows a bold heading, up to the next one; by default its first sentence."""
    words = heading.replace(" ", r"\s+")
    found = re.search(rf"\*\*{words}\.?\*\*\s*(.*?)(?=\n\n|\*\*[A-Z]|\Z)", card, flags=re.DOTALL)
    if found is None:
        return ""
    text = " ".join(found[1].split()).replace("|", "\\|")
    sentence = re.split(r"(?<=[a-z0-9`)])\.\s", text, maxsplit=1)[0]
    return text if whole else sentence.removesuffix(".")


def _strategies(limits: str) -> str:
    return "one device, DDP" if re.search(r"harded strategies[^.]* not supported", limits) else "see the card"


def _measured(card: str) -> str:
    """The first figures of each data set that we measured ourselves, or "none yet"."""
    section = re.search(r"\*\*Results\.?\*\*\s*(.*?)(?=\n\n\*\*[A-Z]|\Z)", card, flags=re.DOTALL)
    paragraphs = [
        " ".join(text.split()).partition("Published")[0] for text in (section[1] if section else "").split("\n\n")
    ]
    gains = [
        f"{ours.partition(' (')[0].partition(',')[0]}: {found[0]}"
        for ours in paragraphs
        if (found := re.search(r"[+-]\d[\d.]* ± [\d.]+ points", ours))
    ]
    if gains:
        return "; ".join(gains)
    first = paragraphs[0].replace("|", "\\|")
    if re.search(r"\d(\.\d+)? ?%|\d\.\d|± ", first):
        return re.split(r"(?<=[a-z0-9`)%])[.;]\s", first, maxsplit=1)[0].strip()
    return "none yet"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
    print(f"{TABLE}: {len(cards())} methods")
