"""A metric that a validation leaves out: Lightning keeps its earlier value, which says nothing of today's weights."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from lightning_merge.callbacks import ASWA, EMA, SMA, SWAD, AcceptIfBetter, Doctor


class Sparing(tiny.Walk):  # type: ignore[misc]
    """Logs ``val/loss`` in every second epoch, lower in each; the end of the fit is not one of them."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.current_epoch % 2 == 0:
            self.log("val/loss", torch.tensor(9.0 - self.current_epoch), batch_size=1)


CHOOSERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Any]] = {
    # what is asked afterwards, and the answer after the epochs 0 to 5, of which 0, 2 and 4 are scored
    "SWAD": (lambda: SWAD("val/loss", stop=False), lambda average: average.evaluations, 3),
    "SMA": (lambda: SMA("val/loss", start_step=0), lambda average: average._state["best_updates"], 10),
    "ASWA": (lambda: ASWA("val/loss", start_epoch=0), lambda average: average._state["updates"], 3),
}


@pytest.mark.parametrize("name", CHOOSERS)
def test_nothing_is_decided_where_the_score_is_left_out(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make, asked, answer = CHOOSERS[name]
    average = make()
    with caplog.at_level("INFO"):
        tiny.trainer(tmp_path, [average], max_epochs=6).fit(Sparing(), tiny.steps(2), tiny.steps(1))
    assert asked(average) == answer
    assert caplog.text.count("has not logged `val/loss`") == 1


@pytest.mark.parametrize("callback", [AcceptIfBetter, Doctor])
def test_a_score_that_is_left_out_at_the_end_does_not_lose_the_fit(callback: Any, tmp_path: Path) -> None:
    average, last, module = EMA(0.5), callback("val/loss"), Sparing()
    tiny.trainer(tmp_path, [average, last], max_epochs=3).fit(module, tiny.steps(2), tiny.steps(1))
    assert tiny.differing(module, average.merged_weights()) == []
    if isinstance(last, AcceptIfBetter):
        assert all(map(math.isnan, last.scores["ema"].values()))
