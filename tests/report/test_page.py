"""The page of a report and what it is made of, without a Trainer."""

import math
import re
from pathlib import Path

import pytest

from lightning_merge._report._chart import Line, chart
from lightning_merge._report._page import page, read
from lightning_merge._report._record import Curve, Record, aged


def test_a_curve_keeps_its_ends_and_its_best_whatever_its_length() -> None:
    curve = Curve()
    for step in range(50_000):
        curve.add(step, -1.0 if step == 12_345 else 2.0 if step == 777 else 0.001 * (step % 100))
    assert len(curve.drawn()) <= 1003
    assert curve.best("min") == (12_345, -1.0)
    assert curve.best("max") == (777, 2.0)
    assert curve.drawn()[-1] == (49_999, 0.099)
    assert {(12_345, -1.0), (777, 2.0)} <= set(curve.drawn())
    gaps = [after[0] - before[0] for before, after in zip(curve.points, curve.points[1:], strict=False)]
    assert max(gaps) <= 2 * curve.every
    curve.cut(20_000)
    assert curve.best("min") == (12_345, -1.0)
    assert curve.drawn()[-1][0] <= 20_000


def test_a_long_tail_is_cut_where_next_to_nothing_is_left() -> None:
    shares = [0.001 * 0.999**age for age in range(100_000)]
    age = aged(range(100_000), shares, 0.0)
    assert len(age.ages) <= 100
    assert age.ages[-1] == pytest.approx(math.log(0.001) / math.log(0.999), abs=1)
    assert age.mass[-1] == pytest.approx(0.999, abs=1e-4)
    assert age.mean == pytest.approx(999, rel=1e-3)


def test_a_record_is_the_same_after_it_was_written_and_read(tmp_path: Path) -> None:
    record = Record("one", "val/loss", "min")
    for step, value in enumerate((1.0, math.nan, math.inf, -math.inf, 3.0)):
        record.measured.setdefault("val/loss", {}).setdefault("raw", Curve()).add(step, value)
    record.ages["ema"] = aged([0, 1], [0.5, 0.25], 0.25)
    record.about["ema"], record.notes = "EMA", ["said"]
    (tmp_path / "page.html").write_text(page([record]), encoding="utf-8")
    assert repr(read(tmp_path / "page.html")) == repr([record])


def drawn(*lines: Line, from_: float = 0.0) -> tuple[list[str], list[str]]:
    """The numbers at the vertical axis, and what is drawn of the lines."""
    text = chart(lines, "step", "loss", from_)
    assert re.search(r"nan|inf", text) is None
    inner = text[text.index("<svg x=") : text.index("</svg>")]
    return re.findall(r'text-anchor="end">([^<]*)<', text), re.findall(r"<(?:path|circle)[^>]*>", inner)


def test_an_axis_has_round_numbers_and_a_line_has_gaps_where_nothing_is_known() -> None:
    line = Line("raw", [(0, 0.0), (1, 1.0), (2, math.nan), (3, 0.5), (4, math.inf), (5, 0.25), (6, 0.75)], None)
    ticks, shapes = drawn(line)
    assert ticks == ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]
    assert [shape.split()[0] for shape in shapes] == ["<path", "<circle", "<path"]
    assert all('class="raw"' in shape for shape in shapes)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.9312, 0.9318], [*(f"0.931{digit}" for digit in range(2, 9))]),
        ([2e6, 9e6], ["2M", "4M", "6M", "8M"]),
        ([3.0, 3.0], ["2.85", "2.90", "2.95", "3.00", "3.05", "3.10", "3.15"]),
        ([0.0, 0.0], ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        ([-1e-9, 1e-9], ["-1e-09", "-5e-10", "0", "5e-10", "1e-09"]),
    ],
    ids=str,
)
def test_ticks_are_written_as_exactly_as_they_lie_apart(values: list[float], ticks: list[str]) -> None:
    assert drawn(Line("a", list(enumerate(values)), 0))[0] == ticks


def test_what_only_the_first_tenth_reaches_does_not_flatten_the_rest() -> None:
    line = Line("a", [(0, 100.0), *((step, 1.0 - 0.001 * step) for step in range(10, 101, 10))], 0)
    assert float(drawn(line, from_=0.1)[0][-1]) <= 1.0
    assert float(drawn(line)[0][-1]) >= 80.0


def test_without_a_finite_point_there_is_no_chart() -> None:
    assert chart([Line("a", [(0, math.nan)], 0), Line("b", [], 1)], "step", "loss") == ""


def test_of_several_runs_each_has_a_colour_and_each_set_its_dashes() -> None:
    def record(title: str) -> Record:
        made = Record(title, about={"ema": "EMA", "swa": "SWA"})
        made.measured["loss"] = {of: Curve() for of in ("raw", "ema", "swa")}
        for number, curve in enumerate(made.measured["loss"].values()):
            for step in (0, 1):
                curve.add(step, number + step)
        return made

    def styles(records: list[Record]) -> list[tuple[str, str]]:
        shapes = re.findall(r"<path class=\"(\w+)\"( stroke-dasharray=\"[^\"]*\")? d=\"M[^\"]*L", page(records))
        return [(colour, dashes.partition('"')[2].strip('"')) for colour, dashes in shapes]

    assert styles([record("one")]) == [("raw", ""), ("c0", ""), ("c1", "")]
    assert styles([record("one"), record("two")]) == [
        *((colour, dashes) for colour in ("c0", "c1") for dashes in ("2 3", "", "7 3"))
    ]
