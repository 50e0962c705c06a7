"""Shares of a run are shares of the steps that an average counts, or are refused with the reason."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from tiny import NetParts, Walk, batches, of, steps, trainer

from lightning_merge.callbacks import DART, EMA, LAWA, SWA, TWA
from lightning_merge.callbacks._lightning._run import planned_length
from lightning_merge.selections import Selection


def run(schedule: dict[int, int] | None = None, epochs: int = -1, most: int = -1, each: float = 8) -> Any:
    """A Trainer as far as its length goes, with batches without end if it has as many."""
    return SimpleNamespace(
        fit_loop=SimpleNamespace(setup_data=lambda: None, max_epochs=epochs),
        lightning_module=SimpleNamespace(automatic_optimization=True),
        callbacks=[] if schedule is None else [GradientAccumulationScheduler(schedule)],
        num_training_batches=each,
        accumulate_grad_batches=1 if schedule is None else schedule.get(0, 1),
        max_steps=most,
        optimizers=[None],
    )


ENDLESS = float("inf")
LENGTHS = {  # steps, epochs, steps of each epoch
    "plain": (run(epochs=3), (24, 3, 8)),
    "cut short": (run(epochs=3, most=10), (10, 3, 8)),
    "as many steps": (run(most=20), (20, 3, 8)),
    "unknown": (run(epochs=3, each=ENDLESS), (None, 3, None)),
    "always four": (run({0: 4}, epochs=3), (6, 3, 2)),
    "one then eight": (run({0: 1, 1: 8}, epochs=5), (12, 5, None)),
    "from the second epoch on": (run({2: 3}, epochs=4), (22, 4, None)),
    "after the end": (run({9: 3}, epochs=2), (16, 2, None)),
    "three stages": (run({0: 8, 1: 4, 3: 1}, epochs=5), (21, 5, None)),
    "so many steps of stages": (run({0: 8, 1: 4, 3: 1}, most=6), (6, 4, None)),
    "that end within a stage": (run({0: 8, 1: 4, 3: 1}, most=4), (4, 3, None)),
    "a billion epochs": (run({0: 1, 5: 8}, epochs=10**9), (10**9 - 5 + 40, 10**9, None)),
}


@pytest.mark.parametrize(("trainer", "expected"), LENGTHS.values(), ids=list(LENGTHS))
def test_steps_of_a_run_are_those_that_accumulation_leaves(trainer: Any, expected: tuple[Any, ...]) -> None:
    found = planned_length(trainer)
    assert (found.steps, found.epochs, found.steps_per_epoch) == expected


def test_an_average_of_the_second_half_begins_in_it_while_accumulation_grows(tmp_path: Path) -> None:
    ema = EMA(decay=0.5, start_step=0.5)
    growing = GradientAccumulationScheduler({0: 1, 1: 4})
    trainer(tmp_path, [ema, growing], max_epochs=3).fit(Walk(), steps(8))
    assert (ema.steps, ema.update_window) == (12, (7, 12))


class SeldomSteps(NetParts):
    """Steps at every second batch, in its own way."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            optimizer.step()


SHARES = {
    "EMA that starts at half": lambda: EMA(start_step=0.5),
    "EMA of two epochs": lambda: EMA(half_life="2 epochs"),
    "EMA of a share": lambda: EMA(half_life="5%"),
    "LAWA that starts at half": lambda: LAWA(k=1, every_n_steps=1, start=0.5),
    "TWA": lambda: TWA(every=1, stage=2, selection=Selection(buffers="copy")),
}


@pytest.mark.parametrize("make", SHARES.values(), ids=list(SHARES))
def test_a_share_of_steps_that_nobody_knows_is_refused_at_the_start(tmp_path: Path, make: Any) -> None:
    with pytest.raises(ValueError, match=r"SeldomSteps.* \(manual optimization\), so nobody knows how often"):
        trainer(tmp_path, [make()], max_epochs=2).fit(of(SeldomSteps)(), batches(4))


def test_what_does_not_depend_on_it_goes_on_under_manual_optimization(tmp_path: Path) -> None:
    ema, swa = EMA(decay=0.5, start_step=1), SWA(start_epoch=0.5, selection=Selection(buffers="copy"))
    trainer(tmp_path, [ema, swa], max_epochs=2).fit(of(SeldomSteps)(), batches(4))
    assert (ema.update_window, swa.updates) == ((2, 4), 2)
    share = EMA(decay=0.5, start_step=0.5)
    trainer(tmp_path / "steps", [share], max_epochs=-1, max_steps=4).fit(of(SeldomSteps)(), batches(4))
    assert share.update_window == (3, 4)


def test_groups_of_branches_are_shares_of_the_same_steps(tmp_path: Path) -> None:
    dart = DART(2, every_n_steps=2, start=0.5, buffers="shared")
    growing = GradientAccumulationScheduler({0: 1})
    trainer(tmp_path, [dart, growing], max_epochs=2).fit(Walk(), steps(4))
    assert dart._running._schedule.start == 4  # type: ignore[attr-defined]
