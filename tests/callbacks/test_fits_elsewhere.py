"""Fits in processes that Lightning forks for them: what they made comes back to the callback that was given."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from ranks import Wide, loaders
from tiny import differing, trainer
from torch import Tensor

from lightning_merge.callbacks import EMA, LAWA, AcceptIfBetter, Doctor, League, Lookaround

pytestmark = pytest.mark.multiprocess


class Writes(Callback):
    """The weights at the first and the last step, in files."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.write(trainer, pl_module, "start")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.write(trainer, pl_module, "end")

    def write(self, trainer: Any, pl_module: Any, when: str) -> None:
        if trainer.global_rank == 0:
            torch.save({name: t.clone() for name, t in pl_module.state_dict().items()}, self.root / when)

    def read(self, when: str) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.load(self.root / when, weights_only=True)
        return found


CALLBACKS: dict[str, Any] = {
    "averages": lambda: [EMA(0.5), LAWA(k=2, every_n_steps=1)],
    "raw weights that were accepted": lambda: [EMA(0.5), AcceptIfBetter("val/loss", mode="max", shares=(0.0,))],
    "an examined average": lambda: [EMA(0.5), Doctor(points=1)],
    "a league": lambda: [EMA(0.5), League([LAWA(k=2, every_n_steps=1, validate="raw")], "val/loss")],
    "branches": lambda: [Lookaround(branches=2, every_n_steps=3)],
}


@pytest.mark.parametrize("what", CALLBACKS)
def test_what_a_forked_fit_made_comes_back_and_the_next_fit_goes_on(what: str, tmp_path: Path) -> None:
    callbacks, module, writes = CALLBACKS[what](), Wide(), Writes(tmp_path)
    first, other = callbacks[0], callbacks[-1]
    twin = copy.deepcopy(first)

    def fit() -> None:
        run = trainer(tmp_path, [*callbacks, writes], strategy="ddp_fork", devices=2, max_epochs=1)
        run.fit(module, *loaders())

    fit()
    assert twin.merged_weights() is None
    assert first.steps > 0
    assert first.updates > 0
    published = first.raw_weights() if getattr(first, "accepted", None) == 0 else first.merged_weights()
    assert not differing({name: t.float() for name, t in published.items()}, module.state_dict())
    raw = first.raw_weights()
    if what != "branches":  # of which the last step is that of another one
        assert not differing(raw, writes.read("end"))
    assert first.final_metrics["val/loss"] > 0
    assert getattr(other, "scores", None) != {}
    assert getattr(other, "examinations", None) != {}
    if isinstance(other, League):
        assert list(other.standings) == ["raw", "ema", "lawa"]
        assert other.winner in other.standings
        assert Path(str(other.path)).is_file()
        assert other.contestants[0].updates == first.updates
    updates = first.updates
    fit()
    assert not differing(raw, writes.read("start"))
    assert first.updates == 2 * updates
