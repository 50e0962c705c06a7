"""Writes what ``benchmarks/digits_recipes.py`` found into the comments of the recipes: ``python docs/make_expect.py``.

A test holds the comments against the file. ``digits/swa`` is written by ``make_first_run.py``.
"""

import re
import textwrap
from pathlib import Path

from measured import as_value, digits_recipes

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FLATTERED = "It chose by these very images, so expect a little less on new ones."
NOTES = {
    "digits/aswa": FLATTERED,
    "digits/best-k": FLATTERED,
    "digits/swad": FLATTERED,
    "digits/ema": "digits/plain lowers its learning rate instead: here the average does what a schedule does, without"
    " knowing when the run ends, and no more.",
    "digits/forkmerge": "Shares were chosen on these very images, which flatters forkmerge; and raw normalises by"
    " statistics that have seen turned images.",
    "digits/anneal": "Its BatchNorm statistics are measured again, which those of raw are not.",
}
"""What the figures do not say."""
SOURCE = "The figures are in benchmarks/results/digits-recipes.json."


def expect(name: str) -> str:
    """The lines of a recipe's comment."""
    found = digits_recipes()[name]
    runs = len(next(iter(found.values())))
    over = f"mean and standard deviation over {runs} seeds"
    how = f"({over}; 449 images, so one is 0.2 points)"
    if name == "continual/digits":
        seen, told = as_value(found["seen"]), as_value(found["told"])
        text = (
            f"after three tasks {seen} % among the classes seen and {told} % told the task ({over}; one image of a task"
        )
        text += " is about 1.1 points)."
    elif name == "digits/search":
        soup, last = (as_value([value / 100 for value in found[each]], 3) for each in ("merged", "raw"))
        text = (
            f"val/loss {soup} for the soup after 40 candidates and {last} for the last file {how}; the search has seen"
        )
        text += " these images."
    elif "merged" not in found:
        text = f"val/acc {as_value(found['raw'])} % at the end {how}."
    else:
        pairs = list(zip(found["merged"], found["raw"], strict=True))
        better, equal = sum(own > raw for own, raw in pairs), sum(own == raw for own, raw in pairs)
        merged, raw = as_value(found["merged"]), as_value(found["raw"])
        text = (
            f"at the end val/acc {merged} % for {name.partition('/')[2]} and {raw} % for raw {how}: better in {better}"
        )
        text += f" of them{f', equal in {equal}' if equal else ''}."
    text = " ".join(["Expect:", text, *([NOTES[name]] if name in NOTES else []), SOURCE])
    lines = textwrap.wrap(text, 114, break_on_hyphens=False, break_long_words=False)
    return "\n".join(f"#{'' if index == 0 else '  '} {line}" for index, line in enumerate(lines)) + "\n"


def written() -> list[str]:
    """The recipes that have such a comment: those with three seeds or more in the file."""
    return [n for n, sets in digits_recipes().items() if "," not in n and len(next(iter(sets.values()))) > 2]


def main() -> None:
    """Writes them."""
    for name in written():
        path = RECIPES / f"{name}.yaml"
        text = path.read_text(encoding="utf-8")
        # Up to what is no further line of it: these are indented.
        new = re.sub(r"(?m)^# Expect:.*\n(?:#   .*\n)*", lambda _: expect(name), text, count=1)  # noqa: B023
        path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
