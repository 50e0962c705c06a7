"""What callbacks save is declared: a dataclass for each, whose fields are the keys of the section in a file."""

from dataclasses import dataclass

import pytest

from lightning_merge._saved import Saved


@dataclass
class Counts(Saved):
    steps: int
    logged: int | None = None


@dataclass
class Whole(Saved):
    counts: Counts
    weights: dict[str, float] | None


def test_a_section_has_a_key_per_field_and_comes_back_as_it_was() -> None:
    whole = Whole(Counts(3), None)
    assert whole.section() == {"counts": {"steps": 3}, "weights": None}
    assert Whole.of(whole.section()) == whole


def test_a_key_that_older_files_do_not_have_may_be_missing() -> None:
    assert Counts.of({"steps": 3}) == Counts(3)
    assert Counts.of(Counts(3, 2).section()) == Counts(3, 2)


def test_keys_that_nobody_declares_are_dropped_and_missing_ones_are_named() -> None:
    assert Counts.of({"steps": 3, "of_later": 1}) == Counts(3)
    with pytest.raises(KeyError, match="weights"):
        Whole.of({"counts": {"steps": 3}})
