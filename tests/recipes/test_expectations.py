"""What a recipe's comment expects is a figure of a file of results."""

import re
import statistics
import sys
from pathlib import Path

import pytest

from lightning_merge.recipes._catalog import recipes

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "docs"))  # where the script is that reads the results

NAMED = re.compile(r"benchmarks/results/([\w-]+)\.json")


def expected(path: Path) -> str:
    """The comment from ``Expect:`` on, as one line."""
    comment = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8"))
    assert comment is not None
    return re.sub(r"\n# *", " ", comment.group()).partition("Expect:")[2]


COMPARED = {
    name: expected(path)
    for name, path in recipes().items()
    if NAMED.search(expected(path)) and not name.startswith(("digits/", "continual/"))  # these are made by scripts
}


def test_there_are_recipes_with_figures() -> None:
    assert len(COMPARED) > 5


@pytest.mark.parametrize("name", COMPARED)
def test_percentages_are_means_of_the_file_that_is_named(name: str) -> None:
    from measured import comparisons

    files = set(NAMED.findall(COMPARED[name]))
    scores = [each.scores for each in comparisons().values() if each.file in files]
    assert scores, files
    means = {f"{statistics.fmean(values):.1f}" for of_file in scores for values in of_file.values()}
    found = re.findall(r"(\d+\.\d) %", COMPARED[name])
    assert found
    assert set(found) <= means
