"""WARP's anchors: a moving average of each branch, to which its training step is held."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import NetParts, batches, differing, of, trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_merge.callbacks import WARP, teacher
from lightning_merge.combiners import SLERP

BENDS = [lambda batch: batch, lambda batch: [batch[0] + 0.3 * batch[0].square(), batch[1]]]
STRENGTH, DECAY, SCALE, ROUND = 0.5, 0.8, 0.3, 3


class HeldParts(NetParts):
    """Its outputs are held to those of the anchor."""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        with teacher(self, "warp"):
            anchored = self(batch[0])
        return self.loss(batch) + STRENGTH * (self(batch[0]) - anchored).square().mean()


def plain_loop(steps: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base after the last round, and the mean of the branches as they are."""
    modules = [of(NetParts)().double() for _ in range(2)]
    anchors = [of(NetParts)().double() for _ in range(2)]
    base = {name: p.detach().clone() for name, p in modules[0].named_parameters()}
    optimizers = [module.configure_optimizers() for module in modules]
    for number, batch in enumerate(batches(steps)):
        for j, module in enumerate(modules):
            x, y = BENDS[j]([t.double() for t in batch])
            loss = (module(x) - y).square().mean() + STRENGTH * (module(x) - anchors[j](x).detach()).square().mean()
            optimizers[j].zero_grad()
            loss.backward()
            optimizers[j].step()
            for anchor, p in zip(anchors[j].parameters(), module.parameters(), strict=True):
                anchor.data.copy_(DECAY * anchor.data + (1 - DECAY) * p.data)
        if number % ROUND == ROUND - 1:
            ways = [{n: p.detach() - base[n] for n, p in module.named_parameters()} for module in modules]
            way = SLERP(scale=SCALE).combine(ways)
            base = {n: base[n] + way[n] for n in base}
            for each in (*modules, *anchors):
                each.load_state_dict(base)
            optimizers = [module.configure_optimizers() for module in modules]
    pairs = zip(*(module.named_parameters() for module in modules), strict=True)
    return base, {n: (p.detach() + q.detach()) / 2 for (n, p), (_, q) in pairs}


def warp(**settings: Any) -> WARP:
    return WARP(2, ROUND, SCALE, DECAY, BENDS, "same", **settings)


@pytest.mark.parametrize("inactive", ["device", "cpu"])
def test_branches_are_held_by_moving_averages_of_their_own(inactive: Any, tmp_path: Path) -> None:
    module, own = of(HeldParts)().double(), warp(inactive=inactive)
    trainer(tmp_path, [own], max_epochs=1, precision="64-true").fit(module, batches(8))
    base, mean = plain_loop(8)
    assert own.merges == 2
    for name, tensor in module.named_parameters():
        torch.testing.assert_close(tensor.detach(), mean[name], rtol=0, atol=1e-10)
        torch.testing.assert_close(own._policy_state["base"][name], base[name], rtol=0, atol=1e-10)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    data = DataLoader([next(iter(batches(1)))] * 8, batch_size=None)

    def fit(folder: str, ckpt_path: Path | None = None) -> Any:
        files = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        module = of(HeldParts)()
        trainer(tmp_path, [warp(), files], max_epochs=1).fit(module, data, ckpt_path=ckpt_path)
        return module

    whole = fit("whole")
    for step in (2, 3, 4):
        assert not differing(whole, fit(f"from {step}", tmp_path / "whole" / f"step={step}.ckpt"))


def test_a_second_fit_goes_on_with_the_anchors(tmp_path: Path) -> None:
    class PlainParts(HeldParts):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = DataLoader([next(iter(batches(1)))] * 4, batch_size=None)
    once, twice = of(PlainParts)(), of(PlainParts)()
    trainer(tmp_path, [warp()], max_epochs=2).fit(once, data)
    own = warp()
    for _ in range(2):
        trainer(tmp_path, [own], max_epochs=1).fit(twice, data)
    assert not differing(once, twice)


def test_what_is_unfrozen_gets_an_anchor(tmp_path: Path) -> None:
    class ThawingParts(HeldParts):
        def __init__(self) -> None:
            super().__init__()
            self.net[0].requires_grad_(False)

        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch > 0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    own = warp()
    trainer(tmp_path, [own], max_epochs=3).fit(of(ThawingParts)(), batches(4))
    assert {name for each in own._anchors.held.values() for name in each} == set(of(NetParts)().state_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": 0}, "`every_n_steps` must be at least 1, got 0"),
        ({"scale": 0.0}, r"`scale` must be in \(0, 1\], got 0.0"),
        ({"decay": 1.0}, r"`decay` must be in \[0, 1\), got 1.0"),
        ({"branches": 0}, "`branches` must be at least 1, got 0"),
    ],
)
def test_an_argument_out_of_range_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WARP(**arguments)
