"""A fit says once what its averages take of a step, if it is much."""

import logging
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import Net, batches, trainer

from lightning_merge.callbacks import EMA, SWAD, Lookaround, WeightMerging
from lightning_merge.callbacks._publication import _toll
from lightning_merge.callbacks._publication._toll import Toll
from lightning_merge.rules import Interpolation, Mean, Rule
from lightning_merge.schedules import EveryNSteps
from lightning_merge.weights import State, Weights


class Slow(Rule):
    """Sleeps in an update, as a large one takes time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def init(self, weights: Weights) -> State:
        return {"last": dict(weights), "updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        time.sleep(self.seconds)
        state["updates"] += 1

    def stored(self, state: State) -> Weights | None:
        return state["last"]  # type: ignore[no-any-return]


class SlowStep(Net):
    """Sleeps in a training step."""

    seconds = 0.0

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        time.sleep(self.seconds)
        return super().training_step(batch, batch_idx)


def said(
    caplog: pytest.LogCaptureFixture, callback: Any, root: Path, steps: int = 30, seconds: float = 0.0
) -> list[str]:
    """The lines about what is taken, of a fit with ``seconds`` of sleep in a step."""
    caplog.clear()
    module = SlowStep()
    module.seconds = seconds
    with caplog.at_level(logging.INFO):
        trainer(root, [callback], max_epochs=1).fit(module, batches(steps))
    return [each.message for each in caplog.records if "MB per step" in each.message]


def test_what_a_slow_update_takes_is_said_once_with_the_cure(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    (line,) = said(caplog, WeightMerging(Slow(0.01), name="slow"), tmp_path, steps=50)
    found = re.fullmatch(
        r"WeightMerging 'slow': taking in weights costs (\S+) ms and 0.0 MB per step, (\d+)% of its (\S+) ms \(time of"
        r" the host, over 20 updates\). For 2%: `schedule=EveryNSteps\((\d+)\)`\.",
        line,
    )
    assert found, line
    hook, share, step, n = map(float, found.groups())
    assert 10 <= hook < 50
    assert step > hook
    assert share == pytest.approx(100 * hook / step, abs=2)
    assert n == pytest.approx(49 * hook / (step - hook), rel=0.3)  # both are rounded


def test_the_cost_of_an_update_is_spread_over_the_steps_between(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    (line,) = said(caplog, WeightMerging(Slow(0.02), EveryNSteps(4), name="slow"), tmp_path, steps=90)
    cost = re.search(r"costs (\S+) ms", line)
    assert cost
    assert 5 <= float(cost[1]) < 15


def test_little_is_not_said_nor_what_has_no_cure_nor_of_a_short_fit(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    assert not said(caplog, WeightMerging(Mean()), tmp_path, seconds=0.05)
    assert not said(caplog, WeightMerging(Slow(0.01)), tmp_path, steps=20)
    assert said(caplog, WeightMerging(Slow(0.01)), tmp_path, steps=21)
    assert not said(caplog, Lookaround(branches=2, every_n_steps=1), tmp_path)


@pytest.mark.parametrize(("hook", "is_said"), [(0.4e-3, False), (0.6e-3, True)])
def test_what_takes_less_than_half_a_millisecond_of_a_short_step_is_not_said(
    hook: float, is_said: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    average: Any = SimpleNamespace(title="EMA", cheaper=lambda n: f"`every_n_steps={n}`", tensors={})
    optimizer, toll, now = torch.optim.SGD([torch.zeros(1)], 0.1), Toll(), 0.0
    monkeypatch.setattr(_toll.time, "perf_counter", lambda: now)
    with caplog.at_level(logging.INFO):
        for _ in range(21):
            now += 3e-3
            toll.note(optimizer, now - hook, [average])
    assert any("MB per step" in each.message for each in caplog.records) is is_said


def test_cures_are_arguments_that_the_callback_has(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    ema, swad = EMA(), SWAD(monitor="val/loss")
    for average in (ema, swad):
        trainer(tmp_path, [average], max_epochs=1).fit(Net(), batches(), batches())
    assert ema.cheaper(7) == "`every_n_steps=7`"
    assert swad.cheaper(7) is None
    assert WeightMerging(Interpolation(0.5)).cheaper(7) == "`schedule=EveryNSteps(7)`"


def test_on_a_device_host_memory_is_a_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    meta = {"w": torch.zeros(2, device="meta")}
    monkeypatch.setattr(EMA, "tensors", meta)
    assert EMA().cheaper(7) == "`every_n_steps=7` or weights taken in beside the training by `device='cpu'`"
    assert EMA(device="cpu").cheaper(7) == "`every_n_steps=7`"
    monkeypatch.setattr(WeightMerging, "tensors", meta)
    assert WeightMerging(Slow(0.0)).cheaper(7) == "`schedule=EveryNSteps(7)`"
