"""Kinds of modules: tied and frozen tensors, buffers of every sort, metrics, late layers, compiled parts."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BaseFinetuning, ModelCheckpoint
from tiny import Net, Walk, batches, differing, raw_of, read, score, steps, trainer, validation, values
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, SWA
from lightning_merge.selections import Selection, without


def test_tied_tensors_are_averaged_once_and_saved_under_each_name(tmp_path: Path) -> None:
    class Tied(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Module()
            self.head.w = self.w

    ema = EMA(decay=0.9)
    checkpoint = ModelCheckpoint(tmp_path)
    module = Tied()
    trainer(tmp_path, [ema, checkpoint], max_epochs=1).fit(module, steps(1))
    assert list(ema.merged_weights()) == ["w", "head.w"]
    assert ema.merged_weights()["w"] is ema.merged_weights()["head.w"]
    assert module.w.item() == pytest.approx(0.1)  # averaged twice it would be 0.19
    assert module.head.w is module.w
    file = read(checkpoint.best_model_path)
    assert file["state_dict"]["w"].item() == file["state_dict"]["head.w"].item() == pytest.approx(0.1)
    resumed, again = Tied(), EMA(decay=0.9)
    trainer(tmp_path, [again], max_epochs=2).fit(resumed, steps(1), ckpt_path=checkpoint.best_model_path)
    assert resumed.w.item() == pytest.approx(0.29)


class Buffers(Walk):
    """A float buffer that holds the weight, a counter, and one that is in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(1))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", torch.zeros(1), persistent=False)

    def on_train_batch_end(self, *args: Any) -> None:
        for buffer in (self.last, self.count, self.seen):
            buffer.add_(1)


@pytest.mark.parametrize(("policy", "last"), [("average", 1.25), ("copy", 2.0), ("recompute", 2.0)])
def test_each_kind_of_buffer_has_its_rule(policy: Any, last: float, tmp_path: Path) -> None:
    module = Buffers()
    ema = EMA(decay=0.5, selection=Selection(buffers=policy))
    checkpoint = ModelCheckpoint(tmp_path)
    trainer(tmp_path, [ema, checkpoint], max_epochs=1).fit(module, steps(3))
    # An update comes before the hook that ends its batch, so the last one sees buffers of 2.
    merged = ema.merged_weights()
    assert merged["last"].item() == last
    assert merged["count"].item() == 2
    assert merged["count"].dtype is torch.int64
    assert "seen" not in merged
    assert module.seen.item() == 3.0
    assert set(read(checkpoint.best_model_path)["state_dict"]) == {"w", "last", "count"}


def test_metrics_are_left_alone(tmp_path: Path) -> None:
    class Measured(Net):
        def __init__(self) -> None:
            super().__init__()
            self.metric = torchmetrics.MeanSquaredError()
            self.metric.persistent(True)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            self.metric(self(batch[0]), batch[1])
            return super().training_step(batch, batch_idx)

    def run(*callbacks: Callback) -> tuple[Any, Any, dict[str, Tensor]]:
        module = Measured()
        checkpoint = ModelCheckpoint(tmp_path / str(len(callbacks)))
        trainer(tmp_path, [*callbacks, checkpoint], max_epochs=1).fit(module, batches(4), validation())
        return module.metric.total, module.metric.sum_squared_error, read(checkpoint.best_model_path)["state_dict"]

    total, error, plain = run()
    ema = EMA(decay=0.8)
    merging_total, merging_error, merging = run(ema)
    assert total == merging_total == 16
    assert error == merging_error
    assert merging.keys() == plain.keys()
    assert torch.equal(merging["metric.sum_squared_error"], plain["metric.sum_squared_error"])
    assert not any(name.startswith("metric") for name in ema.merged_weights())


def test_layers_made_in_configure_model_are_averaged_and_made_once(tmp_path: Path) -> None:
    class Late(Net):
        made = 0

        def configure_model(self) -> None:
            if not isinstance(self.net[2], nn.Sequential):
                Late.made += 1
                torch.manual_seed(1)
                self.net[2] = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 1))

    def run(epochs: int, ckpt_path: str | None = None) -> tuple[EMA, str]:
        ema, checkpoint = EMA(decay=0.8), ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
        late = trainer(tmp_path, [ema, checkpoint], max_epochs=epochs)
        late.fit(Late(), batches(4), validation(), ckpt_path=ckpt_path)
        return ema, checkpoint.last_model_path

    whole, _ = run(2)
    assert Late.made == 1
    assert "net.2.1.weight" in whole.merged_weights()
    _, half = run(1)
    resumed, _ = run(2, ckpt_path=half)
    assert not differing(resumed.merged_weights(), whole.merged_weights())


class Unfreezing(BaseFinetuning):
    """Freezes the first layer, and adds it to the optimizer in the second epoch."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.1)


@pytest.mark.parametrize("trainable", [False, True])
def test_parameters_that_are_unfrozen_later_are_averaged_from_then_on(trainable: bool, tmp_path: Path) -> None:
    class Only(Net):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.1)

        def on_train_batch_end(self, *args: Any) -> None:
            self.path = [*getattr(self, "path", []), self.net[0].bias.detach().clone()]

    module = Only()
    frozen = module.net[0].bias.detach().clone()
    ema = EMA(decay=0.5, selection=Selection(trainable=trainable))
    trainer(tmp_path, [Unfreezing(), ema], max_epochs=2).fit(module, batches(4), validation())
    expected = frozen
    for weights in module.path[4:]:
        expected = expected + 0.5 * (weights - expected)
    assert torch.equal(module.path[3], frozen)
    torch.testing.assert_close(module.net[0].bias.detach(), expected)
    assert not torch.equal(expected, module.path[-1])


def test_a_parameter_that_was_averaged_stays_averaged_when_it_is_frozen(tmp_path: Path) -> None:
    class Freezing(Net):
        def on_train_epoch_start(self) -> None:
            self.net[0].requires_grad_(self.current_epoch == 0)

        def on_train_epoch_end(self) -> None:
            self.frozen = self.net[0].bias.detach().clone()

    ema = EMA(decay=0.5, selection=Selection(trainable=True))
    module = Freezing()
    trainer(tmp_path, [ema], max_epochs=3).fit(module, batches(8), validation())
    # It went on towards where the parameter stays.
    torch.testing.assert_close(ema.merged_weights()["net.0.bias"], module.frozen, atol=1e-4, rtol=0)
    assert not torch.equal(ema.merged_weights()["net.0.bias"], module.frozen)
    assert ema.raw_weights()["net.0.bias"].equal(module.frozen)


def test_what_is_not_selected_is_published_as_it_is_live(tmp_path: Path) -> None:
    ema = EMA(decay=0.8, selection=without("net.2.*"))
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    module = Net()

    class Last(Callback):
        def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.live = values(pl_module)

    last = Last()
    trainer(tmp_path, [ema, checkpoint, last], max_epochs=2).fit(module, batches(4), validation())
    assert not any(name.startswith("net.2") for name in ema.merged_weights())
    assert differing(module, last.live) == ["net.0.bias", "net.0.weight"]
    file = read(checkpoint.best_model_path)
    assert file["lightning_merge"]["score"] == score(file["state_dict"])
    final = read(ema.final_path)
    assert not differing(final["state_dict"], module)
    assert not differing(raw_of(final), last.live)


@pytest.mark.parametrize("wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_parametrised_layers_are_averaged_by_what_is_trained(wrap: Any, tmp_path: Path) -> None:
    class Wrapped(Net):
        def __init__(self) -> None:
            super().__init__()
            wrap(self.net[0])

    def measure(weights: dict[str, Tensor]) -> float:
        module = Wrapped()
        module.load_state_dict(weights)
        module.eval()
        with torch.no_grad():
            return torch.stack([module.loss(batch) for batch in validation()]).mean().item()

    ema, checkpoint = EMA(decay=0.8, validate="both"), ModelCheckpoint(tmp_path, monitor="val/loss")
    run = trainer(tmp_path, [ema, checkpoint], max_epochs=2)
    run.fit(Wrapped(), batches(4), validation())
    file = read(checkpoint.best_model_path)
    assert file["lightning_merge"]["score"] == measure(file["state_dict"])
    assert run.callback_metrics["raw/val/loss"].item() == measure(ema.raw_weights())


def compiled_net(**settings: Any) -> LightningModule:
    class Compiled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.compile(self.net, **settings)

    return Compiled()


def check_compiled(module: LightningModule, tmp_path: Path) -> None:
    """A compiled submodule is averaged under plain names, and validation really runs with the merged weights."""
    torch.compiler.reset()
    ema = EMA(decay=0.8, validate="both")
    run = trainer(tmp_path, [ema], max_epochs=2)
    held_out = batches(2, seed=2)
    run.fit(module, batches(4), held_out)
    assert set(ema.merged_weights()) == {f"net.{layer}.{name}" for layer in (0, 2) for name in ("weight", "bias")}
    merged, raw = run.callback_metrics["val/loss"].item(), run.callback_metrics["raw/val/loss"].item()
    assert merged == pytest.approx(score(ema.merged_weights(), loader=held_out), rel=1e-5)
    assert raw == pytest.approx(score(ema.raw_weights(), loader=held_out), rel=1e-5)
    assert abs(merged - raw) > 1e-3 * raw


def test_a_compiled_submodule_is_averaged_under_plain_names(tmp_path: Path) -> None:
    check_compiled(compiled_net(backend="eager"), tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("gcc") is None, reason="inductor needs a compiler")
def test_an_inductor_graph_sees_the_merged_weights(tmp_path: Path) -> None:
    check_compiled(compiled_net(), tmp_path)


def test_a_compiled_module_gives_the_same_average_as_a_plain_one(tmp_path: Path) -> None:
    torch.compiler.reset()
    averages = []
    for wrap in (lambda module: module, lambda module: torch.compile(module, backend="eager")):
        averages.append(EMA(decay=0.8))
        trainer(tmp_path, [averages[-1]], max_epochs=1).fit(wrap(Net()), batches(4), validation())
    assert not differing(averages[0].merged_weights(), averages[1].merged_weights())


def test_a_file_with_a_compiled_submodule_resumes(tmp_path: Path) -> None:
    torch.compiler.reset()
    checkpoint = ModelCheckpoint(tmp_path, monitor="val/loss")
    trainer(tmp_path, [EMA(decay=0.8), checkpoint], max_epochs=1).fit(
        compiled_net(backend="eager"), batches(4), validation()
    )
    file = read(checkpoint.best_model_path)
    plain = {name.replace("_orig_mod.", ""): tensor for name, tensor in file["state_dict"].items()}
    assert file["lightning_merge"]["score"] == score(plain)
    resumed, whole = EMA(decay=0.8), EMA(decay=0.8)
    run = trainer(tmp_path, [resumed], max_epochs=2)
    run.fit(compiled_net(backend="eager"), batches(4), validation(), ckpt_path=checkpoint.best_model_path)
    trainer(tmp_path, [whole], max_epochs=2).fit(compiled_net(backend="eager"), batches(4), validation())
    assert not differing(resumed.merged_weights(), whole.merged_weights())


def test_a_module_without_parameters_of_the_selection_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="matches no parameter"):
        trainer(tmp_path, [EMA(selection=Selection(include=("head.*",)))], max_epochs=1).fit(Net(), batches(4))


def test_manual_optimisation_without_a_calibration_step_is_an_error_that_says_what_to_define(tmp_path: Path) -> None:
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.automatic_optimization = False

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    with pytest.raises(ValueError, match="calibration_step"):
        trainer(tmp_path, [SWA(start_epoch=1)], max_epochs=1).fit(Manual(), batches(4))

    class Calibrated(Manual):
        def calibration_step(self, batch: list[Tensor]) -> None:
            self(batch[0])

    swa, module = SWA(start_epoch=1), Calibrated()
    trainer(tmp_path, [swa], max_epochs=2).fit(module, batches(4))
    hidden = module.net[0](torch.cat([x for x, _ in batches(4)] * 2))
    torch.testing.assert_close(module.net[1].running_mean, hidden.mean(0))
    assert (swa.steps, swa.updates) == (8, 2)
