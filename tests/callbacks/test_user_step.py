"""The step that a user wrote, run outside training: it runs on other people's modules, and training notices nothing."""

import random
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import NetParts, batches, differing, of, trainer, validation, values
from torch import Tensor, nn
from torchmetrics.regression import MeanSquaredError

from lightning_merge.callbacks import EMA, LAWA, SMA, SWA, SWAD, TWA, ContinualMerging, Lookaround
from lightning_merge.callbacks._lightning._measure import measured
from lightning_merge.selections import Selection

MEASURED = Selection(buffers="recompute")


class KeepingParts(NetParts):
    """Keeps a queue in a buffer, counters, lists, a metric and random numbers of its own, and drops out."""

    def __init__(self) -> None:
        super().__init__(norm=True, lr=0.02)
        self.net.append(nn.Dropout(0.2))
        self.register_buffer("queue", torch.zeros(3))
        self.memory = torch.zeros(3)
        self.metric = MeanSquaredError()
        self.seen, self.history, self.last = 0, {"sizes": []}, deque(maxlen=2)
        self.rng = np.random.default_rng(0)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        self.seen += len(x)
        self.history["sizes"].append(len(x))
        self.last.append(self.seen)
        noise = random.random() + float(np.random.rand()) + self.rng.random() + torch.rand(len(x), 1)
        out = self(x) + 0.01 * noise + 0.001 * self.seen
        self.queue[self.seen % 3] = out.detach().mean()
        self.memory[self.seen % 3] += 1
        self.metric(out.detach(), y)
        self.log("train/mse", self.metric, on_step=False, on_epoch=True)
        loss = nn.functional.mse_loss(out, y)
        self.log_dict({"train/loss": loss})
        return loss

    def everything(self) -> dict[str, Tensor]:
        """All that a training step leaves behind."""
        numbers = [
            self.seen,
            *self.last,
            *self.history["sizes"],
            self.rng.bit_generator.state["state"]["state"] % 10**6,
        ]
        return values(self) | {"memory": self.memory.clone(), "kept": torch.tensor(numbers)}


Keeping = of(KeepingParts)

AVERAGES: dict[str, Any] = {
    "SWA": lambda: SWA(1, validate="raw"),
    "LAWA": lambda: LAWA(every_n_steps=3, validate="raw"),
    "SWAD": lambda: SWAD("val/loss", selection=MEASURED, validate="raw"),
    "TWA": lambda: TWA(every=2, stage=4, validate="raw"),
    "SMA": lambda: SMA("val/loss", selection=MEASURED, validate="both"),
    "EMA": lambda: EMA(0.9, selection=MEASURED, validate="raw"),
    "Lookaround": lambda: Lookaround(1, every_n_steps=2, validate="raw"),
}


def run(root: Path, callbacks: list[Any]) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """What each training step began with, and the metrics of each epoch."""
    path: list[dict[str, Tensor]] = []
    metrics: list[dict[str, float]] = []

    class Witness(Keeping):  # type: ignore[misc, valid-type]
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            path.append(self.everything())

        def on_train_epoch_end(self) -> None:
            metrics.append({key: float(value) for key, value in self.trainer.callback_metrics.items()})

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    run = trainer(root, callbacks, max_epochs=3, val_check_interval=0.5)
    run.fit(Witness(), batches(4, shuffle=True), validation())
    return path, metrics


@pytest.mark.parametrize("name", AVERAGES)
def test_with_raw_validation_training_is_that_of_a_run_without_the_callback(name: str, tmp_path: Path) -> None:
    (plain, plain_metrics), (path, metrics) = (run(tmp_path, each) for each in ([], [AVERAGES[name]()]))
    steps = 8 if name == "TWA" else 12  # its second stage is another training
    assert len(plain) == len(path) == 12
    assert not [differing(a, b) for a, b in zip(plain[:steps], path[:steps], strict=True) if differing(a, b)]
    if name not in ("TWA", "SMA"):  # SMA adds those of the average
        assert metrics == plain_metrics


class ForcesParts(NetParts):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x = batch[0].clone().requires_grad_(True)
        (slope,) = torch.autograd.grad(self(x).sum(), x, create_graph=True)
        return (slope + batch[0]).square().mean()


class Detector(nn.Module):
    """Gives losses in train mode and detections in eval mode, as those of torchvision do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: list[Tensor], targets: Any = None) -> Any:
        out = self.net(torch.stack(images))
        if self.training:
            return {"box": (out - torch.stack([each["box"] for each in targets])).square().mean()}
        return [{"boxes": each} for each in out]


class DetectingParts(NetParts):
    def __init__(self, norm: bool = True) -> None:
        super().__init__(norm=norm)
        self.net: nn.Module = Detector(self.net)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        losses = self.net(list(batch[0]), [{"box": box} for box in batch[1]])
        return sum(losses.values())  # type: ignore[return-value]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/found", float(len(self.net(list(batch[0])))))


class BatchOnlyParts(NetParts):
    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)


class AnyArgumentsParts(NetParts):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        assert len(args) == 2
        return self.loss(args[0])


class ThreeArgumentsParts(NetParts):
    def training_step(self, batch: Any, number: int, dataloader_idx: int = 0) -> Tensor:
        return self.loss(batch)


class ScriptedParts(NetParts):
    def __init__(self, norm: bool = True) -> None:
        super().__init__(norm=norm)
        self.net: Any = torch.jit.script(self.net)


class OnlyTrainModeParts(NetParts):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.training
        return self.loss(batch)


class LoggingParts(NetParts):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        for logger in self.loggers:
            logger.log_metrics({"own": 1.0})
        return self.loss(batch)


class MomentumParts(NetParts):
    """Moves a second network after the first in its step, as BYOL and MoCo do."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__(norm=norm)
        self.second = nn.Linear(4, 8).requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            self.second.weight.lerp_(self.net[0].weight, 0.1)
        return self.loss(batch)


PARTS = [
    ForcesParts,
    DetectingParts,
    BatchOnlyParts,
    AnyArgumentsParts,
    ThreeArgumentsParts,
    ScriptedParts,
    OnlyTrainModeParts,
    LoggingParts,
    MomentumParts,
]


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("make", [lambda: SWA(1), lambda: Lookaround(1, every_n_steps=2)], ids=["SWA", "Lookaround"])
def test_statistics_are_measured_on_modules_of_every_kind(parts: type, make: Any, tmp_path: Path) -> None:
    callback, module = make(), of(parts)(norm=True)
    run = trainer(tmp_path, [callback], max_epochs=2)
    run.fit(module, batches(), validation())
    layer = "net.net.1" if parts is DetectingParts else "net.1"
    merged, raw = callback.merged_weights(), callback.raw_weights()
    assert not torch.equal(merged[f"{layer}.running_mean"], raw[f"{layer}.running_mean"])
    state = module.state_dict()
    first = "net.net.0" if parts is DetectingParts else "net.0"
    inputs = torch.cat([batch[0] for batch in batches()] * 2)
    reached = nn.functional.linear(inputs, state[f"{first}.weight"], state[f"{first}.bias"])
    torch.testing.assert_close(state[f"{layer}.running_mean"], reached.mean(0), rtol=1e-4, atol=1e-5)


def test_a_batch_goes_through_the_transfer_hooks_once(tmp_path: Path) -> None:
    class Normalising(of(NetParts)):  # type: ignore[misc]
        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2 + 5, batch[1]]

    module = Normalising(norm=True)
    trainer(tmp_path, [SWA(1)], max_epochs=1).fit(module, batches())
    state, inputs = module.state_dict(), torch.cat([batch[0] for batch in batches()]) * 2 + 5
    reached = nn.functional.linear(inputs, state["net.0.weight"], state["net.0.bias"]).mean(0)
    torch.testing.assert_close(state["net.1.running_mean"], reached, rtol=1e-4, atol=1e-5)


def test_scores_are_measured_on_batches_that_went_through_all_transfer_hooks(tmp_path: Path) -> None:
    class Normalising(of(NetParts)):  # type: ignore[misc]
        def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] + 1, batch[1]]

        def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
            return [batch[0] * 2, batch[1]]

        def score_step(self, batch: Any) -> Any:
            return batch[0].sum(), batch[0].numel()

        def on_train_end(self) -> None:
            found.append(measured(self.trainer, self, None))

    found: list[float] = []
    trainer(tmp_path, max_epochs=1).fit(Normalising(), batches(), validation())
    inputs = torch.cat([batch[0] for batch in validation()])
    assert found == [pytest.approx(float(((inputs + 1) * 2).mean()), rel=1e-5)]


class NeverOutsideParts(NetParts):
    """Its step needs what only a training loop has."""

    def on_train_batch_start(self, *args: Any) -> None:
        self.inside = True

    def on_before_zero_grad(self, *args: Any) -> None:
        self.inside = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        assert self.inside, "not in a loop"
        return self.loss(batch)


def cured(parts: Any) -> Any:
    """A module of these parts with the cure that the error names."""

    class Cured(of(parts)):  # type: ignore[misc]
        def calibration_step(self, batch: Any) -> None:
            self(batch[0])

    return Cured(norm=True)


CALLBACKS: dict[str, Any] = {
    "SWA that starts late": lambda folder: SWA(5),
    "LAWA": lambda folder: LAWA(every_n_steps=3),
    "EMA": lambda folder: EMA(0.9, selection=MEASURED),
    "Lookaround": lambda folder: Lookaround(1, every_n_steps=2),
    "ContinualMerging": lambda folder: ContinualMerging("average", folder / "bank", selection=MEASURED),
}


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_step_that_cannot_run_outside_training_is_refused_at_the_first_batch(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, [CALLBACKS[name](tmp_path)], max_epochs=6)
    with pytest.raises(
        ValueError, match=r"(?s)does not run outside training: AssertionError: not in a loop.*calibration_step"
    ):
        run.fit(of(NeverOutsideParts)(norm=True), batches())
    assert run.global_step <= 1

    trainer(tmp_path, [CALLBACKS[name](tmp_path)], max_epochs=6).fit(cured(NeverOutsideParts), batches())


def test_an_error_of_the_step_itself_is_the_users_own(tmp_path: Path) -> None:
    class Broken(of(NetParts)):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            raise KeyError("typo")

    with pytest.raises(KeyError, match="typo"):
        trainer(tmp_path, [SWA(1)], max_epochs=1).fit(Broken(norm=True), batches())


class IteratorParts(NetParts):
    def training_step(self, dataloader_iter: Any) -> Tensor:
        batch, _, _ = next(dataloader_iter)
        return self.loss(batch)


@pytest.mark.parametrize("name", CALLBACKS)
def test_a_step_that_fetches_its_batches_itself_needs_a_calibration_step(name: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, [CALLBACKS[name](tmp_path)], max_epochs=1)
    with pytest.raises(
        ValueError, match=r"`dataloader_iter` and fetches its batches itself\. Define `calibration_step"
    ):
        run.fit(of(IteratorParts)(norm=True), batches())
    assert run.global_step == 0


def test_batches_that_a_step_fetches_itself_are_kept_for_calibration_step(tmp_path: Path) -> None:
    module = cured(IteratorParts)
    trainer(tmp_path, [SWA(1)], max_epochs=1).fit(module, batches())
    state, inputs = module.state_dict(), torch.cat([batch[0] for batch in batches()])
    reached = nn.functional.linear(inputs, state["net.0.weight"], state["net.0.bias"]).mean(0)
    torch.testing.assert_close(state["net.1.running_mean"], reached, rtol=1e-4, atol=1e-5)


def test_what_a_step_moved_and_cannot_be_put_back_is_said_once(tmp_path: Path) -> None:
    class Reading(of(NetParts)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.source = iter(range(1000))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            next(self.source)
            return self.loss(batch)

    with pytest.warns(UserWarning, match="has moved 'source', which cannot be put back.*calibration_step") as said:
        trainer(tmp_path, [SWA(1)], max_epochs=2).fit(Reading(), batches(), validation())
    assert sum("cannot be put back" in str(each.message) for each in said) == 1


def test_a_layer_that_is_frozen_keeps_its_statistics_whenever_they_are_measured(tmp_path: Path) -> None:
    class Frozen(of(NetParts)):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.net.append(nn.BatchNorm1d(1))

        def on_train_epoch_start(self) -> None:
            self.net[1].eval()

    swa = SWA(1)
    trainer(tmp_path, [swa], max_epochs=2).fit(Frozen(), batches(), validation())
    merged = swa.merged_weights()
    assert torch.equal(merged["net.1.running_mean"], torch.zeros(8))
    assert not torch.equal(merged["net.3.running_mean"], torch.zeros(1))
