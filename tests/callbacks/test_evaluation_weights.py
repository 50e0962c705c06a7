"""EvaluationWeights: what schedule-free optimizers evaluate is what is measured, saved and left; training is theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import launch
from ranks import Wide, ddp, fit, loaders, together
from tiny import Net, Walk, batches, differing, raw_of, read, steps, trainer, values
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_merge.callbacks import EMA, EvaluationWeights

schedulefree = pytest.importorskip("schedulefree")
KINDS = {
    "sgd": lambda p: schedulefree.SGDScheduleFree(p, lr=0.1, warmup_steps=3),
    "adamw": lambda p: schedulefree.AdamWScheduleFree(p, lr=0.02, weight_decay=0.01),
    "radam": lambda p: schedulefree.RAdamScheduleFree(p, lr=0.02),
}


class Free(Net):  # type: ignore[misc]
    """Trained without a schedule."""

    def __init__(self, kind: str = "adamw", **settings: Any) -> None:
        super().__init__(**settings)
        self.kind = kind

    def configure_optimizers(self) -> Any:
        return KINDS[self.kind](self.parameters())


class Modes(Callback):
    """What the package asks its users to do themselves."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        trainer.optimizers[0].train()


def by_hand(module: Any, epochs: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights that are trained and those to evaluate after a loop as the package's own page has it."""
    optimizer = module.configure_optimizers()
    for _ in range(epochs):
        for batch in batches(4):
            optimizer.train()
            optimizer.zero_grad()
            module.loss(batch).backward()
            optimizer.step()
    trained = values(module)
    optimizer.eval()
    return trained, values(module)


@pytest.mark.parametrize("kind", KINDS)
def test_training_is_that_of_the_package_and_the_module_ends_with_what_it_evaluates(kind: str, tmp_path: Path) -> None:
    trained, evaluated = by_hand(Free(kind), 3)
    module, average = Free(kind), EvaluationWeights(validate="both")
    run = trainer(tmp_path, [average], max_epochs=3)
    run.fit(module, batches(4), batches(1, seed=5))
    assert differing(average.raw_weights(), trained) == []
    assert differing(module, evaluated) == []
    plain = Free(kind)
    for prefix, expected in (("", evaluated), ("raw/", trained)):
        plain.load_state_dict(expected)
        loss = plain.loss(next(iter(batches(1, seed=5)))).item()
        assert run.callback_metrics[f"{prefix}val/loss"].item() == pytest.approx(loss, rel=1e-6)


def test_by_the_formulas_of_the_paper(tmp_path: Path) -> None:
    class Half(Walk):  # type: ignore[misc]
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.w.square().sum() / 2

        def configure_optimizers(self) -> Any:
            return schedulefree.SGDScheduleFree(self.parameters(), lr=0.5)

    for count, evaluated, trained in ((2, 0.375, 0.3625), (3, 0.27291667, 0.2525), (4, 0.1903125, 0.16553125)):
        average, module = EvaluationWeights(), Half(start=1.0)
        trainer(tmp_path, [average], max_epochs=1).fit(module, steps(count), steps(1))
        assert module.w.item() == pytest.approx(evaluated, rel=1e-6)
        assert average.raw_weights()["w"].item() == pytest.approx(trained, rel=1e-6)


@pytest.mark.parametrize("validate", ["merged", "raw", "both"])
def test_nothing_that_is_measured_or_saved_on_the_way_changes_training(validate: Any, tmp_path: Path) -> None:
    class Careful(Free):
        """Switches modes itself, where the package's page says so."""

        def on_train_epoch_start(self) -> None:
            self.optimizers().train()

        def on_validation_epoch_start(self) -> None:
            self.optimizers().eval()

        def on_validation_epoch_end(self) -> None:
            self.trainer.optimizers[0].eval()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.optimizers().eval()

    plain = Free(norm=True)
    trainer(tmp_path, [Modes()], max_epochs=3).fit(plain, batches(4))
    average = EvaluationWeights(validate=validate)
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer(tmp_path, [average, files], max_epochs=3, val_check_interval=1).fit(
        Careful(norm=True), batches(4), batches(1)
    )
    raw = average.raw_weights()
    assert differing(raw, {name: tensor for name, tensor in values(plain).items() if name in raw}) == []


@pytest.mark.parametrize("at", [5, 7])
def test_files_hold_what_was_measured_and_a_resumed_run_ends_as_the_uninterrupted_one(at: int, tmp_path: Path) -> None:
    stateful = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader

    def fitted(root: Path, *files: Any, **settings: Any) -> tuple[EvaluationWeights, Any]:
        average, module = EvaluationWeights(), Free(norm=True)
        run = trainer(root, [average, *files], max_epochs=3)
        run.fit(module, stateful(batches(4).dataset, batch_size=4), batches(1), **settings)
        return average, module

    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=at, save_top_k=-1)
    best = ModelCheckpoint(tmp_path, filename="best-{step}", monitor="val/loss", save_top_k=-1)
    whole, module = fitted(tmp_path, files, best)
    resumed, again = fitted(tmp_path / "again", ckpt_path=str(tmp_path / f"step={at}.ckpt"))
    assert resumed.updates == whole.updates == 12
    assert differing(module, again) == []
    assert differing(whole.raw_weights(), resumed.raw_weights()) == []
    for path, score in best.best_k_models.items():
        plain, file = Free(norm=True).eval(), read(path)
        plain.load_state_dict(file["state_dict"])
        assert plain.loss(next(iter(batches(1)))).item() == pytest.approx(score.item(), rel=1e-5)
        assert differing(file["state_dict"], raw_of(file)) != []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("monitor", ["val/loss", "raw/val/loss"])
def test_without_the_callback_a_run_goes_on_from_its_files_as_from_those_of_the_package(
    kind: str, monitor: str, tmp_path: Path
) -> None:
    data = DataLoader([next(iter(batches(1)))] * 4, batch_size=None)  # the same in whatever order
    file = ModelCheckpoint(tmp_path, filename="file", monitor=monitor)
    trainer(tmp_path, [EvaluationWeights(validate="both"), file], max_epochs=1).fit(Free(kind), data, batches(1))
    saved = read(tmp_path / "file.ckpt")
    if monitor == "val/loss":
        assert [group["train_mode"] for group in saved["optimizer_states"][0]["param_groups"]] == [False]
    module, whole = Free(kind), EvaluationWeights()
    with pytest.warns(UserWarning, match="callbacks used to create the checkpoint need to be provided"):
        trainer(tmp_path, [Modes()], max_epochs=2).fit(module, data, ckpt_path=tmp_path / "file.ckpt")
    trainer(tmp_path, [whole], max_epochs=2).fit(Free(kind), data, batches(1))
    for name, tensor in whole.raw_weights().items():
        torch.testing.assert_close(values(module)[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_finished_run_that_is_resumed_keeps_the_statistics_of_its_file(tmp_path: Path) -> None:
    module, again = Free(norm=True), Free(norm=True)
    run = trainer(tmp_path, [EvaluationWeights(), ModelCheckpoint(tmp_path, "last")], max_epochs=2)
    run.fit(module, batches(4), batches(1))
    run = trainer(tmp_path / "again", [EvaluationWeights()], max_epochs=2)
    run.fit(again, batches(4), batches(1), ckpt_path=str(tmp_path / "last.ckpt"))
    assert differing(module, again) == []


def test_batch_norm_statistics_are_those_of_the_weights_to_evaluate(tmp_path: Path) -> None:
    module = Free("sgd", norm=True)
    trainer(tmp_path, [EvaluationWeights()], max_epochs=4).fit(module, batches(4), batches(1))
    inputs = torch.cat([batch[0] for batch in batches(4)])
    hidden = module.net[0](inputs)
    torch.testing.assert_close(module.net[1].running_mean, hidden.mean(0), rtol=1e-4, atol=1e-5)
    variance = hidden.var(0, unbiased=False) * 64 / 63  # of the batches of all four epochs
    torch.testing.assert_close(module.net[1].running_var, variance, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_accumulated_gradients_and_mixed_precision(settings: dict[str, Any], tmp_path: Path) -> None:
    average, module, plain = EvaluationWeights(), Free(), Free()
    trainer(tmp_path, [Modes()], max_epochs=2, **settings).fit(plain, batches(4))
    run = trainer(tmp_path, [average], max_epochs=2, **settings)
    run.fit(module, batches(4), batches(1))
    assert average.updates == run.global_step
    assert differing(average.raw_weights(), plain) == []
    assert differing(module, plain) != []


def test_several_optimizers_are_all_asked(tmp_path: Path) -> None:
    class Two(Net):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            first, last = self.net[0].parameters(), self.net[2].parameters()
            return schedulefree.SGDScheduleFree(first, lr=0.1), schedulefree.AdamWScheduleFree(last, lr=0.02)

        def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
            for optimizer in self.optimizers()[: 1 + batch_idx % 2]:
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

    average, module = EvaluationWeights(), Two()
    run = trainer(tmp_path, [average], max_epochs=2)
    run.fit(module, batches(4), batches(1))
    expected = Two()
    expected.load_state_dict(average.raw_weights())
    for optimizer, trained in zip(expected.configure_optimizers(), run.optimizers, strict=True):
        optimizer.load_state_dict(trained.state_dict())
        for group in optimizer.param_groups:
            group["train_mode"] = True
        optimizer.eval()
    assert (average.updates, differing(module, expected)) == (12, [])


class Unfreezing(Callback):
    """Trains the last layer too from a step on."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.at:
            trainer.optimizers[0].add_param_group({"params": list(pl_module.net[2].parameters())})


class Frozen(Free):
    """Trains its first layer."""

    def configure_optimizers(self) -> Any:
        return KINDS[self.kind](self.net[0].parameters())


@pytest.mark.parametrize("at", [0, 3, 9])
@pytest.mark.parametrize("kind", KINDS)
def test_parameters_that_are_unfrozen_late_have_a_second_set(kind: str, at: int, tmp_path: Path) -> None:
    average, module, expected = EvaluationWeights(), Frozen(kind), Frozen(kind)
    trainer(tmp_path, [average, Unfreezing(at)], max_epochs=3).fit(module, batches(4), batches(1))
    optimizer = expected.configure_optimizers()
    for step, batch in enumerate([*batches(4)] * 3):
        if step == at:
            optimizer.add_param_group({"params": list(expected.net[2].parameters())})
        optimizer.train()
        optimizer.zero_grad()
        expected.loss(batch).backward()
        optimizer.step()
    assert differing(average.raw_weights(), expected) == []
    optimizer.eval()
    assert differing(module, expected) == []


@pytest.mark.parametrize(
    ("given", "got"), [(None, "got NoneType"), ([], "got list"), ({"w": [2.0]}, "got list for `w`")], ids=str
)
def test_what_a_function_gives_is_checked(given: Any, got: str, tmp_path: Path) -> None:
    run = trainer(tmp_path, [EvaluationWeights(lambda module: given)], max_epochs=1)
    with pytest.raises(TypeError, match=f"`second` of .* must give tensors by parameter name, {got}"):
        run.fit(Walk(), steps(1), steps(1))


def test_a_function_gives_the_second_set_of_any_optimizer(tmp_path: Path) -> None:
    def doubled(module: nn.Module) -> dict[str, Tensor]:
        return {"w": 2 * module.w.detach()}

    module = Walk()
    average = EvaluationWeights(doubled)
    trainer(tmp_path, [average], max_epochs=1).fit(module, steps(4), steps(1))
    assert (module.w.item(), average.raw_weights()["w"].item()) == (8.0, 4.0)
    with pytest.raises(ValueError, match="`second` of EvaluationWeights 'evaluation' must give tensors by parameter"):
        trainer(tmp_path, [EvaluationWeights(lambda module: {"v": module.w})], max_epochs=1).fit(
            Walk(), steps(1), steps(1)
        )


def test_a_function_that_gives_a_nan_where_there_is_none_is_named(tmp_path: Path) -> None:
    broken = EvaluationWeights(lambda module: {"w": module.w.detach() / 0})
    with pytest.warns(UserWarning, match="`second` gives for `w` holds a NaN or an infinity after 2 steps"):
        trainer(tmp_path, [broken], max_epochs=1).fit(Walk(), steps(2), steps(1))


def test_a_later_eval_does_not_move_what_was_published(tmp_path: Path) -> None:
    module = Free()
    run = trainer(tmp_path, [EvaluationWeights()], max_epochs=1)
    run.fit(module, batches(4), batches(1))
    published = values(module)
    run.optimizers[0].eval()
    assert differing(module, published) == []


def test_what_does_not_go_together_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    with pytest.raises(ValueError, match=r"needs an optimizer with a second set of weights, .* got SGD"):
        trainer(tmp_path, [EvaluationWeights()], max_epochs=1).fit(Net(), batches(1), batches(1))
    with pytest.raises(TypeError, match="`second` must be a function, got 3"):
        EvaluationWeights(3)  # type: ignore[arg-type]

    class Scheduled(Free):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2)]

    with pytest.warns(UserWarning, match="AdamWScheduleFree needs no schedule, and CosineAnnealingLR changes its"):
        trainer(tmp_path, [EvaluationWeights()], max_epochs=1).fit(Scheduled(), batches(1), batches(1))
    capsys.readouterr()
    trainer(tmp_path, [EvaluationWeights(), EMA(0.5)], max_epochs=1).fit(Free(), batches(1), batches(1))
    said = "EMA 'ema' merges the weights that AdamWScheduleFree trains, not those that it gives for evaluation"
    assert said in "".join(capsys.readouterr()) + caplog.text


class FreeWide(Wide):
    """Trained without a schedule, by each of several processes on its share."""

    def configure_optimizers(self) -> Any:
        return schedulefree.AdamWScheduleFree(self.parameters(), lr=0.02)


def in_two_processes(root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, epochs, path in (("first", 1, None), ("resumed", 2, root / "last.ckpt"), ("whole", 2, None)):
        average = EvaluationWeights(validate="both")
        files = [ModelCheckpoint(root, "last")] if epochs == 1 else []
        fit(root, [average, *files], FreeWide(), ddp(), path, max_epochs=epochs)
        found[key] = together(average, average.merged_weights())
    return found


@pytest.mark.multiprocess
def test_in_two_processes_it_is_that_of_one_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    first, second = launch(2, in_two_processes, tmp_path)
    assert differing(first["whole"], second["whole"]) == []
    assert differing(first["whole"], first["resumed"]) == []
    torch.manual_seed(0)
    module = FreeWide()
    trainer(tmp_path, [EvaluationWeights()], max_epochs=2).fit(module, *loaders())
    for name, tensor in values(module).items():
        torch.testing.assert_close(first["whole"][name], tensor, rtol=1e-5, atol=1e-6)
