"""Writes what ``benchmarks/first_run.py`` found into README, ``first-run.md`` and the recipe.

Run it after the benchmark; a test holds the three against the file.
"""

import json
import math
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "first-run.json"
BEGIN, END = "<!-- first-run: made by docs/make_first_run.py -->", "<!-- first-run: end -->"


def _percent(of: dict[str, float]) -> str:
    return f"{100 * of['mean']:.1f} ± {100 * of['standard_deviation']:.1f} %"


def table() -> str:
    """The accuracies over the seeds, as Markdown."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    rows = {
        "raw": "raw weights at the end",
        "raw_measured_again": "raw weights, BatchNorm statistics measured again",
        "swa": "**swa**",
        "annealed": "no average: the same run with a cosine schedule",
    }
    lines = ["| validation accuracy | mean ± standard deviation | lowest to highest |", "|---|---|---|"]
    for name, text in rows.items():
        of = found["summary"][name]
        span = f"{100 * of['lowest']:.1f} to {100 * of['highest']:.1f} %"
        lines.append(f"| {text} | {_percent(of)} | {span} |")
    return "\n".join(lines)


def sentences() -> str:
    """What the figures mean, in Markdown."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    clear, runs = found["summary"]["gain_in_standard_errors"], len(found["runs"])
    again = found["summary"]["swa"]["mean"] - found["summary"]["raw_measured_again"]["mean"]
    behind = found["summary"]["annealed"]["mean"] - found["summary"]["swa"]["mean"]
    word = "more" if behind > 0 else "less"
    return (
        f"Over {runs} seeds, on {found['images']} images that nothing was chosen by. In every run swa is better by"
        f" {math.floor(clear['lowest'])} standard errors or more. Most of the gap is BatchNorm: at this rate the raw"
        " weights move so fast that their statistics lag behind; measured again, they are"
        f" {100 * again:.1f} points behind swa. A schedule that lowers the rate reaches {100 * abs(behind):.1f} points"
        f" {word} than swa: the average does what a schedule does, without knowing when the run ends."
    )


def block() -> str:
    """All of it, between two comments."""
    return f"{BEGIN}\n\n{table()}\n\n{sentences()}\n\n{END}"


def expect() -> str:
    """The lines of the recipe's comment."""
    found = json.loads(RESULTS.read_text(encoding="utf-8"))
    of = found["summary"]
    swa, raw, again, annealed = (_percent(of[name]) for name in ("swa", "raw", "raw_measured_again", "annealed"))
    return (
        f"# Expect: at the end val/acc {swa} for swa and {raw} for raw (mean and standard deviation over\n"
        f"#   {len(found['runs'])} seeds; 449 images); raw with BatchNorm statistics measured again {again}; the same"
        f" run with a\n#   cosine schedule instead {annealed}. The figures are in benchmarks/results/first-run.json.\n"
    )


def main() -> None:
    """Writes the three files."""
    for path in (ROOT / "README.md", ROOT / "docs" / "first-run.md"):
        text = path.read_text(encoding="utf-8")
        new = re.sub(f"{BEGIN}.*?{END}", lambda _: block(), text, flags=re.DOTALL)
        path.write_text(new, encoding="utf-8")
    recipe = ROOT / "recipes" / "digits" / "swa.yaml"
    text = recipe.read_text(encoding="utf-8")
    recipe.write_text(re.sub(r"# Expect:.*?(?=^[^#])", lambda _: expect(), text, flags=re.DOTALL | re.MULTILINE))


if __name__ == "__main__":
    main()
