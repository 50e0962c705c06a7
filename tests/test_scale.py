"""The page about scale is made of formulas, and the formulas are what small models were counted to take."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from processes import launch

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "docs"), str(ROOT / "benchmarks")]
RESULTS = ROOT / "benchmarks" / "results"
ROWS = json.loads((RESULTS / "scale.json").read_text())["rows"]


def test_the_page_is_made_of_the_formulas() -> None:
    import make_scale

    page = make_scale.PAGE.read_text()
    assert make_scale.made(page) == page, "run `python docs/make_scale.py`"
    with pytest.raises(ValueError, match="the block 'machine' once, found 0"):
        make_scale.made("")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['what']}, {row['processes']}")
def test_what_was_counted_is_what_the_formula_says(row: dict[str, Any]) -> None:
    loose = {"written": 0.03, "file": 0.03, "in turn": 0.03, "most at": 0.1}  # headers, counters of steps
    tolerance = max((value for word, value in loose.items() if word in row["what"]), default=0)
    assert row["counted"] == pytest.approx(row["formula"], rel=tolerance)


def test_a_message_is_as_long_as_the_formula_says_also_where_blocks_are_not_full() -> None:
    from _costs import all_gather, all_reduce, all_to_all, mean

    assert all_reduce(100, 4) == 150
    assert all_to_all(100, 4) == 75
    assert all_gather(100, 4) == 300
    assert mean([300, 5], 32, 2) == 4 * 305
    assert mean([300, 5], 8, 2) == 2 * 2 * 260  # three blocks, and one more so that two processes share them
    assert mean([300, 5], 4, 1) == 0


def counted_again(root: Path) -> list[dict[str, Any]]:
    import scale

    dist.init_process_group("gloo")
    return scale.whole(2, root)


@pytest.mark.multiprocess
def test_branches_in_processes_still_send_what_the_file_says(tmp_path: Path) -> None:
    recorded = {row["what"]: row for row in ROWS if row["processes"] == 2}
    for found in launch(2, counted_again, tmp_path):
        assert len(found) > 8
        for row in found:
            assert row == recorded[row["what"]]


def test_streaming_diloco_sends_what_the_formula_says() -> None:
    rows = json.loads((RESULTS / "streaming-diloco.json").read_text())["sent"]
    assert len(rows) > 4
    for row in rows:
        assert row["alike in both processes"]
        more = {key: row["counted"][key] - row["formula"][key] for key in ("per step", "most")}
        buffers = 4 * 32 * 32 if row["contestant"] == "synchronous" else 0  # the mask, which DDP sends at each step
        assert more == {key: pytest.approx(8 + buffers) for key in more}  # Trainer: whether to stop
