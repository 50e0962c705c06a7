"""Optimizers that a hook sets up again in mid-run, as for layers that are unfrozen."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import Walk, steps, trainer

from lightning_merge.callbacks import EMA, LAWA, SWA, Anchor, Lookaround


class SetsUpAgain(Walk):
    """Before the third batch."""

    assigns = False

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2 and self.assigns:
            self.trainer.optimizers = [torch.optim.SGD(self.parameters(), lr=self.lr)]
        elif batch_idx == 2:
            self.trainer.strategy.setup_optimizers(self.trainer)


class Assigns(SetsUpAgain):
    assigns = True


@pytest.mark.parametrize("module", [SetsUpAgain, Assigns])
@pytest.mark.parametrize("make", [lambda: EMA(decay=0.5), lambda: LAWA(2, every_n_steps=1), lambda: SWA(0)])
def test_an_average_counts_the_steps_of_the_new_ones(make: Any, module: type[Walk], tmp_path: Path) -> None:
    def run(module: Any) -> tuple[float, int]:
        average = make()
        trainer(tmp_path, [average], max_epochs=1).fit(module, steps(5))
        return module.w.item(), average.steps

    assert run(module()) == run(Walk())


@pytest.mark.parametrize("module", [SetsUpAgain, Assigns])
def test_an_anchor_pulls_after_the_steps_of_the_new_ones(module: type[Walk], tmp_path: Path) -> None:
    def run(module: Any) -> float:
        trainer(tmp_path, [Anchor(0.25)], max_epochs=1).fit(module, steps(5))
        return module.w.item()

    assert run(module()) == pytest.approx(run(Walk()))


@pytest.mark.parametrize("module", [SetsUpAgain, Assigns])
def test_branches_refuse_them(module: type[Walk], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="were replaced after the fit began"):
        trainer(tmp_path, [Lookaround(2, 2)], max_epochs=1).fit(module(), steps(5))
