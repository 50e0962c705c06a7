"""``Trainer(fast_dev_run=...)`` tries every callback, also one whose plan has no room in a few steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from golden.runs import loaders, module
from methods import METHODS
from tiny import trainer

from lightning_merge.callbacks import TWA, Anneal

LONG: dict[str, Callable[[], list[Any]]] = {
    "anneal, by default": lambda: [Anneal()],
    "anneal, longer than the run": lambda: [Anneal(window=500, every_n_steps=50), Anneal(window="9 epochs", name="b")],
    "anneal, sliding": lambda: [Anneal(window=500, memory=3), Anneal(every_n_steps=9, memory=3, name="b")],
    "twa, by default": lambda: [TWA()],
    "twa, rare": lambda: [TWA(every=100, stage="9 epochs", start=100)],
}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("method", [*METHODS, *LONG])
@pytest.mark.filterwarnings("ignore")
def test_every_callback_runs_in_a_few_steps(
    method: str, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, {**METHODS, **LONG}[method](), fast_dev_run=n)
    run.fit(module(method), *loaders())
    assert run.global_step == n


@pytest.mark.parametrize("method", LONG)
def test_a_plan_without_room_is_said_and_tried(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level("INFO")
    averages = LONG[method]()
    trainer(tmp_path, averages, fast_dev_run=3).fit(module(method), *loaders())
    said = caplog.text + "".join(capsys.readouterr())
    assert said.count("no room in this `fast_dev_run`") == len(averages)
    assert [average.updates for average in averages] == [3 if "anneal" in method else 1] * len(averages)
    assert all(average.ready for average in averages)
