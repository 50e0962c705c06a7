"""Makes docs/results.md, each paper's claim beside our figures, and README's column of verdicts.

``python docs/make_results.py`` writes both. ``claims.yaml`` has the claims, ``benchmarks/results`` the figures;
``measured.py`` says what counts as shown.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from make_table import as_table, cards, short_title
from measured import as_difference, comparisons, counted

PAGE = Path(__file__).parent / "results.md"
README = Path(__file__).parents[1] / "README.md"
CLAIMS = Path(__file__).parent / "claims.yaml"
UNTESTED = "exact, untested on a task"
COLUMNS = ("method", "the claim", "shown here", "ours, in points", "file in `benchmarks/results`")

HEAD = f"""\
# Results

What each method's paper claims, and whether it shows in our figures. *Shown here*: *yes* if the whole interval of every
difference lies above zero, *conditional* if of some, *no* if of none. "{UNTESTED}": its numbers are those of the
published code or formula, and nobody here has trained with it to see what it gains. Our settings are small: a *no* is
about these budgets, which the cards describe. Differences have [±](glossary.md#plus-minus).

*Made from `docs/claims.yaml` and `benchmarks/results` by `python docs/make_results.py`: change those, not this page.*

"""


def page() -> str:
    """The whole page."""
    return HEAD + as_table(COLUMNS, [_row(card) for card in cards()])


def readme() -> str:
    """README with a word for each card that a row of its table links."""
    lines = README.read_text(encoding="utf-8").splitlines(keepends=True)
    return "".join(_with_verdicts(line) if line.startswith("| `") else line for line in lines)


def _with_verdicts(line: str) -> str:
    linked = re.findall(r"\(docs/methods/([\w-]+)\.md\)", line)
    if not linked:
        return line
    signs = {card.stem: _shown(card)[0].partition(":")[0] for card in cards()}
    words = ["untested" if signs[card] == UNTESTED else signs[card] for card in linked]
    cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
    return "| " + " | ".join([*cells[:4], ", ".join(words)]) + " |\n"


def claims() -> dict[str, Any]:
    """By card, its ``claim``, and under ``shown`` pairs of contestants by comparison.

    Raises:
        ValueError: If a card, a comparison or a contestant does not exist.
    """
    found: dict[str, Any] = yaml.safe_load(CLAIMS.read_text(encoding="utf-8"))
    if unknown := set(found) - {card.stem for card in cards()}:
        raise ValueError(f"{CLAIMS.name} names no card of docs/methods: {', '.join(sorted(unknown))}.")
    for card, claim in found.items():
        for name, pairs in claim["shown"].items():
            known = comparisons()[name].scores if name in comparisons() else {}
            if missing := [one for pair in pairs for one in pair if one not in known]:
                raise ValueError(f"{CLAIMS.name}, {card}: {name} has no contestant {missing[0]!r}.")
    return found


def sign(differences: list[tuple[float, float]]) -> str:
    """``yes``, ``conditional``, ``no``, or that there is nothing to go by."""
    above, count = counted(differences)
    if not count:
        return UNTESTED
    return "yes" if above == count else f"conditional: {above} of {count}" if above else "no"


def _shown(card: Path) -> tuple[str, list[str], list[str]]:
    """The sign, the differences as text, and the files."""
    claim = claims().get(card.stem, {"claim": "", "shown": {}})
    differences, ours, files = [], [], []
    for name, pairs in claim["shown"].items():
        each = comparisons()[name]
        for one, other in pairs:
            found = each.difference(one, other)
            differences.append(found)
            points = as_difference(*found, each.digits)
            ours.append(f"{points} {one} beside {other} ({each.title}; {len(each.scores[one])} seeds)")
        files.append(f"`{each.file}.json`")
    return sign(differences), ours, list(dict.fromkeys(files))


def _row(card: Path) -> tuple[str, ...]:
    link, claim = f"[{short_title(card)}](methods/{card.name})", claims().get(card.stem, {"claim": ""})["claim"]
    shown, ours, files = _shown(card)
    return (link, claim, shown, "<br>".join(ours), "<br>".join(files))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    README.write_text(readme(), encoding="utf-8")
    print(f"{PAGE}: {len(cards())} methods")
