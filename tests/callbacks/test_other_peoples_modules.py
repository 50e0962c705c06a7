"""Modules as other people write them: each runs, resumes bit for bit, or is refused by the name of the parameter."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import batches, differing, trainer, validation
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, LAWA, PAPA, SWA, TWA, Lookaround, WeightMerging
from lightning_merge.rules import Rule
from lightning_merge.schedules import EveryNSteps
from lightning_merge.weights import State, Weights, clone


class Plain(pl.LightningModule):
    """A regression on four features."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.build()

    def build(self) -> None:
        """What a module of this kind has besides."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.body(x)))
        return out

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.training_step(batch, 0))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


class Masked(Plain):
    """A causal mask in a buffer, and one that is a frozen parameter."""

    def build(self) -> None:
        mask = torch.full((4, 4), -torch.inf).triu(1)
        self.register_buffer("mask", mask)
        self.frozen = nn.Parameter(mask.clone(), requires_grad=False)


class Observed(Plain):
    """A range that starts empty, as observers of quantisation have it."""

    def build(self) -> None:
        self.register_buffer("low", torch.tensor(torch.inf))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        self.low.copy_(torch.minimum(self.low, batch[0].min()))
        return super().training_step(batch, batch_idx)


class SquareTie(Plain):
    """A square matrix used transposed: a tie whose two shapes are equal."""

    def build(self) -> None:
        self.back = nn.Linear(4, 4)
        self.back.weight = nn.Parameter(self.body.weight.detach().t(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.tanh(self.back(torch.tanh(self.body(x)))))


class TiedAtTheStart(SquareTie):
    """Ties its layers when the fit begins."""

    def build(self) -> None:
        self.back = nn.Linear(4, 4)

    def on_fit_start(self) -> None:
        self.back.weight = self.body.weight


class Lazy(Plain):
    """Layers whose sizes the first batch tells, or a file."""

    def build(self) -> None:
        self.body = nn.LazyLinear(4)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self(torch.zeros(1, 4))
        return super().configure_optimizers()


class Growing(Plain):
    """A buffer that comes with the first batch and grows."""

    def build(self) -> None:
        self.register_buffer("history", None)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        new = batch[0].mean().reshape(1)
        self.history = new if self.history is None else torch.cat([self.history, new])
        return super().training_step(batch, batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.history = torch.empty_like(checkpoint["state_dict"]["history"])


class Resized(Plain):
    """A buffer that is given another size as it is, as observers of quantisation do, in the second epoch."""

    def build(self) -> None:
        self.register_buffer("range", torch.ones(1))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        if self.current_epoch == 1:
            self.range.resize_(3).fill_(batch_idx)
        return super().training_step(batch, batch_idx)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.range.resize_(checkpoint["state_dict"]["range"].shape)


class Renamed(Plain):
    """Loads files in which its head had another name."""

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {key.replace("head", "classifier"): t for key, t in super().state_dict(*args, **kwargs).items()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        named = {key.replace("classifier", "head"): tensor for key, tensor in state_dict.items()}
        return super().load_state_dict(named, *args, **kwargs)


METHODS: dict[str, Callable[[], Any]] = {
    "ema": lambda: EMA(decay=0.8),
    "swa": lambda: SWA(start_epoch=1),
    "lawa": lambda: LAWA(k=2),
    "lookaround": lambda: Lookaround(branches=2, every_n_steps=2),
    "papa": lambda: PAPA(branches=2, every_n_steps=2),
    "twa": lambda: TWA(every="1 epochs", stage="30%"),
}
NOT = {("twa", TiedAtTheStart): "`back.weight` was"}
"""Refused by name."""


@pytest.mark.parametrize("kind", [Masked, Observed, SquareTie, TiedAtTheStart, Lazy, Growing, Resized, Renamed])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_merges_and_goes_on_from_its_file_bit_for_bit(method: str, kind: type[Plain], tmp_path: Path) -> None:
    def run(folder: str, start: str | None = None) -> tuple[Plain, Any]:
        module, average = kind(), METHODS[method]()
        files = ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{epoch}")
        trainer(tmp_path, [average, files], max_epochs=4).fit(module, batches(4), validation(), ckpt_path=start)
        return module, average

    refusal = NOT.get((method, kind))
    with pytest.raises(ValueError, match=refusal) if refusal else nullcontext():
        module, average = run("whole")
        again, resumed = run("resumed", str(tmp_path / "whole" / "epoch=1.ckpt"))
    if refusal:
        return
    assert average.ready
    assert average.updates
    assert differing(module, again) == []
    assert differing(average.raw_weights(), resumed.raw_weights()) == []
    assert differing(average.merged_weights(), resumed.merged_weights()) == []


class NewHead(Plain):
    """Puts another layer in the place of its head in mid-fit."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.head = nn.Linear(4, 1)


class Pruned(Plain):
    """Cuts units out of its layers as they are, in the second epoch."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.body.weight.data, self.body.bias.data = self.body.weight[:1].detach(), self.body.bias[:1].detach()
            self.head.weight.data = self.head.weight[:, :1].detach()
            self.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)  # momentum would not fit


@pytest.mark.parametrize("method", METHODS)
def test_a_parameter_that_is_cut_as_it_is_is_named(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`body.weight`.* was (replaced|frozen, unfrozen, or replaced)"):
        trainer(tmp_path, [METHODS[method]()], max_epochs=4).fit(Pruned(), batches(4))


@pytest.mark.parametrize("method", ["lookaround", "papa"])
def test_a_parameter_that_is_replaced_while_branches_train_is_named(method: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`head.weight` was replaced"):
        trainer(tmp_path, [METHODS[method]()], max_epochs=2).fit(NewHead(), batches(4))


class Extended(Plain):
    """Has a parameter that its older files have not, and says that this is all right."""

    def build(self) -> None:
        self.gate = nn.Parameter(torch.zeros(1), requires_grad=False)
        self.strict_loading = False


@pytest.mark.parametrize("method", ["ema", "swa", "lawa"])
def test_what_a_file_has_no_average_of_starts_anew_if_loading_is_not_strict(method: str, tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")
    before, after, module = METHODS[method](), METHODS[method](), Extended()
    trainer(tmp_path, [before, files], max_epochs=4).fit(Plain(), batches(4))
    path = str(tmp_path / "epoch=2.ckpt")
    trainer(tmp_path, [after], max_epochs=4).fit(module, batches(4), ckpt_path=path)
    assert differing(before.merged_weights() | {"gate": torch.zeros(1)}, after.merged_weights()) == []


class Last(Rule):
    """A rule of one's own, whose class is no dataclass: its ``repr`` is another in every process."""

    def init(self, weights: Weights) -> State:
        return {"last": clone(weights), "updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        state["last"] = clone(weights)
        state["updates"] += 1

    def stored(self, state: State) -> Weights | None:
        last: Weights = state["last"]
        return last


@pytest.mark.filterwarnings("ignore:.*goes on from a file that was written with")
def test_a_rule_without_a_telling_repr_resumes(tmp_path: Path) -> None:
    def run(folder: str, start: str | None = None) -> WeightMerging:
        average = WeightMerging(Last(), EveryNSteps(1))
        files = ModelCheckpoint(tmp_path / folder, save_top_k=-1, filename="{epoch}")
        trainer(tmp_path, [average, files], max_epochs=2).fit(Plain(), batches(4), validation(), ckpt_path=start)
        return average

    whole = run("whole")
    resumed = run("resumed", str(tmp_path / "whole" / "epoch=0.ckpt"))
    assert resumed.updates == whole.updates == 8
    assert differing(whole.merged_weights(), resumed.merged_weights()) == []
