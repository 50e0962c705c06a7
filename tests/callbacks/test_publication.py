"""Which weights are measured and which are live: during validation, after the fit, in the next fit, and without any."""

import logging
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torchmetrics
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging
from lightning.pytorch.loggers.logger import DummyLogger
from tiny import (
    Net,
    NetParts,
    Walk,
    WalkParts,
    batches,
    differing,
    of,
    raw_of,
    read,
    score,
    steps,
    trainer,
    validation,
    values,
)
from torch import Tensor, nn

from lightning_merge.callbacks import EMA, SWA, WeightMerging
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNEpochs
from lightning_merge.selections import Selection

VALIDATION_HOOKS = (
    "on_validation_start",
    "on_validation_epoch_start",
    "on_validation_batch_start",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
)


class Looking(Callback):
    """The weight that each hook sees; also made the module's own hooks by ``looking``."""

    def __init__(self) -> None:
        self.looks: dict[str, list[float]] = {}

    def look(self, hook: str, module: LightningModule) -> None:
        self.looks.setdefault(hook, []).append(module.w.item())


for _hook in (*VALIDATION_HOOKS, "on_train_batch_start", "on_train_batch_end", "on_train_epoch_end"):

    def _look(self: Looking, trainer: Trainer, pl_module: LightningModule, *args: Any, hook: str = _hook) -> None:
        self.look(hook, pl_module)

    setattr(Looking, _hook, _look)


def looking_module(package: ModuleType, looks: Looking) -> LightningModule:
    def hook_of(hook: str) -> Any:
        return lambda self, *args, **kwargs: looks.look(hook, self)

    hooks = {hook: hook_of(hook) for hook in VALIDATION_HOOKS}
    return type("LookingWalk", (of(WalkParts, package),), hooks)()


class Metrics(Callback):
    """The metrics of every validation, and every loss of training."""

    def __init__(self) -> None:
        self.validations: list[dict[str, float]] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(outputs["loss"].item())

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.validations.append({key: value.item() for key, value in trainer.callback_metrics.items()})


def test_all_validation_hooks_of_module_and_callbacks_see_the_merged_weights(
    package: ModuleType, tmp_path: Path
) -> None:
    before, after, own = Looking(), Looking(), Looking()
    run = trainer(tmp_path, [before, EMA(decay=0.5), after], package=package, max_epochs=2)
    run.fit(looking_module(package, own), steps(2), steps(1))
    merged = [1.25, 3.0625]
    for looks in (before, after, own):
        assert {hook: looks.looks[hook] for hook in VALIDATION_HOOKS} == dict.fromkeys(VALIDATION_HOOKS, merged)
    for looks in (before, after):
        assert looks.looks["on_train_batch_start"] == [0.0, 1.0, 2.0, 3.0]
        assert looks.looks["on_train_batch_end"] == [1.0, 2.0, 3.0, 4.0]
        assert looks.looks["on_train_epoch_end"] == [2.0, 4.0]


@pytest.mark.parametrize(
    ("validate", "expected"),
    [
        ("merged", {"val/w": 1.25}),
        ("raw", {"val/w": 2.0, "ema/val/w": 1.25}),  # its final weights are measured once, after training
        ("both", {"val/w": 1.25, "raw/val/w": 2.0}),
    ],
)
def test_validate_says_which_weights_are_measured_and_under_which_names(
    validate: Any, expected: dict[str, float], package: ModuleType, tmp_path: Path
) -> None:
    ema = EMA(decay=0.5, validate=validate)
    run = trainer(tmp_path, [ema], package=package, max_epochs=1)
    module = of(WalkParts, package)()
    run.fit(module, steps(2), steps(1))
    assert {key: value.item() for key, value in run.callback_metrics.items()} == expected
    assert module.w.item() == 1.25


def test_several_averages_are_measured_side_by_side(tmp_path: Path) -> None:
    fast, slow, swa = EMA(decay=0.5, validate="both", name="fast"), EMA(decay=0.75, name="slow"), SWA(start_epoch=2)
    metrics = Metrics()
    module = Walk()
    trainer(tmp_path, [fast, slow, swa, metrics], max_epochs=3).fit(module, steps(2), steps(1))
    averages = {"": fast, "slow/": slow, "swa/": swa}
    expected = {f"{prefix}val/w": average.merged_weights()["w"].item() for prefix, average in averages.items()}
    assert metrics.validations[-1] == expected | {"raw/val/w": 6.0}
    assert module.w.item() == expected["val/w"] == 5.015625
    assert swa.merged_weights()["w"].item() == 5.0
    # Before SWA starts, what is monitored under its name is measured on the raw weights.
    assert metrics.validations[0]["swa/val/w"] == 2.0


def test_measuring_both_costs_nothing_else(tmp_path: Path) -> None:
    class Counting(Callback):
        ends = 0

        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            assert not pl_module.training
            Counting.ends += 1

    class Training(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            assert self.training
            return super().training_step(batch, batch_idx)

    stopping = EarlyStopping("val/loss", patience=100)
    checkpoint = ModelCheckpoint(tmp_path, monitor="raw/val/loss", save_top_k=-1)
    callbacks = [EMA(decay=0.8, validate="both"), Counting(), stopping, checkpoint]
    run = trainer(tmp_path, callbacks, max_epochs=3, val_check_interval=2)
    run.fit(Training(), batches(4), validation())
    assert run.global_step == 12
    # Early stopping and checkpoints hear of each validation once.
    assert stopping.wait_count + 1 <= 6
    assert len(checkpoint.best_k_models) == 6


@pytest.mark.parametrize("validate", ["raw", "merged", "both"])
@pytest.mark.parametrize("average", ["ema", "swa", "recompute"])
def test_training_is_bit_identical_to_a_run_without_the_callback(validate: Any, average: str, tmp_path: Path) -> None:
    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__(norm=True)
            self.net.append(nn.Dropout(0.3))

        def on_train_epoch_end(self) -> None:
            self.ends = [*getattr(self, "ends", []), values(self)]

    def run(*callbacks: Callback) -> tuple[Any, ...]:
        torch.manual_seed(5)
        metrics = Metrics()
        module = Noisy()
        plain = [key for key in ("val/loss",) if validate == "raw" or not callbacks]
        settings = {"max_epochs": 3, "val_check_interval": 2}
        trainer(tmp_path, [*callbacks, metrics], **settings).fit(module, batches(4, shuffle=True), validation())
        measured = [[seen[key] for key in plain] for seen in metrics.validations]
        return module.ends, metrics.losses, torch.get_rng_state(), measured

    make = {
        "ema": lambda: EMA(decay=0.8, validate=validate),
        "swa": lambda: SWA(start_epoch=1, validate=validate),
        "recompute": lambda: EMA(decay=0.8, validate=validate, selection=Selection(buffers="recompute")),
    }
    ends, losses, state, measured = run()
    merging_ends, merging_losses, merging_state, merging_measured = run(make[average]())
    assert len(ends) == 3
    assert not any(differing(left, right) for left, right in zip(ends, merging_ends, strict=True))
    assert losses == merging_losses
    assert torch.equal(state, merging_state)
    if validate == "raw":
        assert measured == merging_measured[: len(measured)]  # one more at the end: that of the final average


@pytest.mark.slow
def test_a_train_loader_with_persistent_workers_is_left_alone(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> tuple[list[float], dict[str, Tensor]]:
        torch.manual_seed(5)
        metrics = Metrics()
        module = Net(norm=True)
        loader = batches(8, shuffle=True, num_workers=1, persistent_workers=True, multiprocessing_context="fork")
        trainer(tmp_path, [*callbacks, metrics], max_epochs=2).fit(module, loader, validation())
        return metrics.losses, callbacks[0].raw_weights() if callbacks else values(module)

    losses, weights = run()
    swa = SWA(start_epoch=1, validate="raw")
    merging_losses, merging_weights = run(swa)
    assert len(losses) == 16
    assert losses == merging_losses
    assert not differing(weights, merging_weights)


@pytest.mark.parametrize("average", ["swa", "ema"])
def test_recomputed_statistics_are_those_of_the_merged_weights(average: str, tmp_path: Path) -> None:
    callback = SWA(start_epoch=1) if average == "swa" else EMA(decay=0.8, selection=Selection(buffers="recompute"))
    module = Net(norm=True)
    run = trainer(tmp_path, [callback], max_epochs=2)
    run.fit(module, batches(4), validation())
    hidden = module.net[0](torch.cat([x for x, _ in batches(4)] * 2))  # both epochs
    torch.testing.assert_close(module.net[1].running_mean, hidden.mean(0))
    torch.testing.assert_close(module.net[1].running_var, hidden.var(0))
    assert run.callback_metrics["val/loss"].item() == score(module.state_dict(), norm=True)
    raw = callback.raw_weights()
    assert not torch.allclose(raw["net.1.running_mean"], module.net[1].running_mean)


def test_a_training_step_that_writes_to_its_batch_changes_no_statistics(tmp_path: Path) -> None:
    class Doubling(Net):
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            batch[0].mul_(2)
            return super().training_step(batch, batch_idx)

    module = Doubling(norm=True)
    trainer(tmp_path, [SWA(start_epoch=1)], max_epochs=2).fit(module, batches(4), validation())
    hidden = module.net[0](2 * torch.cat([x for x, _ in batches(4)] * 2))
    torch.testing.assert_close(module.net[1].running_mean, hidden.mean(0))


def test_statistics_are_measured_in_the_precision_of_training(tmp_path: Path) -> None:
    module = Net(norm=True)
    run = trainer(tmp_path, [SWA(start_epoch=1)], max_epochs=1, precision="bf16-mixed")
    run.fit(module, batches(4), validation())
    inputs = torch.cat([x for x, _ in batches(4)])
    with torch.autocast("cpu", torch.bfloat16):
        hidden = module.net[0](inputs).float()
    torch.testing.assert_close(module.net[1].running_mean, hidden.mean(0))
    assert not torch.allclose(module.net[1].running_mean, module.net[0](inputs).mean(0))


def test_an_average_that_never_starts_changes_nothing_and_says_so_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def run(*callbacks: Callback) -> tuple[dict[str, Tensor], list[Any], dict[str, Tensor]]:
        metrics = Metrics()
        module = Net(norm=True)
        trainer(tmp_path, [*callbacks, metrics], max_epochs=2).fit(module, batches(4), validation())
        return values(module), metrics.validations, metrics.losses

    plain = run()
    with caplog.at_level(logging.INFO):
        never = run(EMA(start_step=1000))
    assert not differing(plain[0], never[0])
    assert plain[1:] == never[1:]
    notices = [record.message for record in caplog.records if "merged nothing" in record.message]
    assert len(notices) == 1
    assert "'ema'" in notices[0]


def test_the_sanity_check_measures_the_raw_weights(tmp_path: Path) -> None:
    ema, module = EMA(decay=0.5), Walk(start=3.0)
    looks = []
    for _ in range(2):
        seen = Looking()
        run = trainer(tmp_path, [ema, seen], max_epochs=1, num_sanity_val_steps=1)
        run.fit(module, steps(2), steps(1))
        looks.append(seen.looks["on_validation_end"])
    assert looks == [[3.0, 4.25], [5.0, 6.0625]]


def test_after_the_fit_the_module_holds_a_copy_of_the_primary(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ema, other = EMA(decay=0.5), EMA(decay=0.75, name="other")
    module = Walk()
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [ema, other], max_epochs=1).fit(module, steps(2))
    assert (module.w.item(), ema.raw_weights()["w"].item()) == (1.25, 2.0)
    assert len([record for record in caplog.records if "now holds the merged weights" in record.message]) == 1
    with torch.no_grad():
        module.w.fill_(100.0)
    assert ema.merged_weights()["w"].item() == 1.25
    assert ema.raw_weights()["w"].item() == 2.0


def test_a_second_fit_continues_the_run(package: ModuleType, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def run(fits: int) -> tuple[dict[str, Tensor], dict[str, Tensor], list[int]]:
        module = of(NetParts, package)(norm=True)
        module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.1)
        averages = [EMA(decay=0.8), WeightMerging(Mean(), EveryNEpochs(), name="mean")]
        for _ in range(fits):
            trainer(tmp_path, averages, package=package, max_epochs=4 // fits).fit(module, batches(4))
        return values(module), averages[0].raw_weights(), [average.updates for average in averages]

    once = run(1)
    with caplog.at_level(logging.INFO):
        twice = run(2)
    assert not differing(once[0], twice[0])
    assert not differing(once[1], twice[1])
    assert once[2] == twice[2] == [16, 4]
    assert len([record for record in caplog.records if "raw weights are back in place" in record.message]) == 1


def test_a_second_fit_with_another_primary_continues_the_run(tmp_path: Path) -> None:
    ema, mean = EMA(decay=0.5), WeightMerging(Mean(), EveryNEpochs(), name="mean")
    module = Walk()
    trainer(tmp_path, [ema, mean], max_epochs=2).fit(module, steps(1))
    trainer(tmp_path, [mean], max_epochs=2).fit(module, steps(1))
    assert mean.raw_weights()["w"].item() == 4.0
    assert module.w.item() == 2.5  # the mean of 1, 2, 3, 4


def test_a_second_fit_starts_from_weights_that_were_changed_in_between(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ema = EMA(decay=0.5)
    module = Walk()
    trainer(tmp_path, [ema], max_epochs=1).fit(module, steps(2))
    with torch.no_grad():
        module.w.fill_(7.0)
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [ema], max_epochs=1).fit(module, steps(1))
    assert ema.raw_weights()["w"].item() == 8.0
    assert module.w.item() == 4.625  # halfway from 1.25 to 8
    assert any("not the published ones any more" in record.message for record in caplog.records)


def test_a_fresh_callback_starts_from_what_is_live(tmp_path: Path) -> None:
    module = Walk()
    trainer(tmp_path, [EMA(decay=0.5)], max_epochs=1).fit(module, steps(2))
    trainer(tmp_path, [EMA(decay=0.5)], max_epochs=1).fit(module, steps(1))
    assert module.w.item() == 1.75  # from 1.25 halfway to 2.25


def test_validate_and_test_between_fits_measure_the_published_weights_and_change_nothing(tmp_path: Path) -> None:
    class Tested(Walk):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("test/w", self.w.sum())

        def predict_step(self, batch: Tensor, batch_idx: int) -> float:
            return self.w.item()

    ema = EMA(decay=0.5)
    module = Tested()
    run = trainer(tmp_path, [ema], max_steps=2)
    run.fit(module, steps(2), steps(1))
    assert run.validate(module, steps(1), verbose=False) == [{"val/w": 1.25}]
    assert run.test(module, steps(1), verbose=False) == [{"test/w": 1.25}]
    assert run.predict(module, steps(1)) == [1.25]
    trainer(tmp_path, [ema], max_steps=4).fit(module, steps(4), steps(1))
    assert (ema.updates, ema.raw_weights()["w"].item()) == (6, 6.0)
    assert module.w.item() == 5.015625


def test_the_averages_of_a_finished_fit_are_never_trained_on(tmp_path: Path) -> None:
    ema = EMA(decay=0.8)
    module = Net(norm=True)
    trainer(tmp_path, [ema], max_epochs=1).fit(module, batches(4), validation())
    first = values(ema.merged_weights())
    trainer(tmp_path, [EMA(decay=0.8)], max_epochs=1).fit(module, batches(4), validation())
    assert not differing(ema.merged_weights(), first)
    assert differing(module, first)


def test_two_averages_of_one_name_are_an_error_that_says_the_name(tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match="twin"):
        trainer(tmp_path, [EMA(name="twin"), SWA(name="twin")], max_epochs=1).fit(Walk(), steps(2))


def test_two_unnamed_averages_of_one_class_are_an_error_that_says_the_name(tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match="ema"):
        trainer(tmp_path, [EMA(), EMA(decay=0.9)], max_epochs=1).fit(Walk(), steps(2))


@pytest.mark.parametrize("first", [True, False])
def test_another_callback_that_swaps_weights_is_an_error_that_names_both(first: bool, tmp_path: Path) -> None:
    callbacks = [WeightAveraging(), EMA()] if first else [EMA(), WeightAveraging()]
    with pytest.raises(ValueError, match=r"(?s)WeightAveraging.*EMA"):
        trainer(tmp_path, callbacks, max_epochs=1).fit(Walk(), steps(2))


def test_names_that_would_clash_with_raw_or_with_paths_are_refused() -> None:
    for name in ("raw", "", "a/b", "a\\b", "a:b", "a?", "a\n", ".", "..", " a", "a" * 101):
        with pytest.raises(ValueError, match="`name` must be a word other than 'raw' and without '/'"):
            EMA(name=name)


def test_merged_metrics_steer_early_stopping_and_plateau_schedulers(tmp_path: Path) -> None:
    class Plateau(Walk):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, mode="max", patience=0)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val/w"}}

    ema = EMA(decay=0.5)
    # The raw weight falls from the second epoch on; the average follows it later.
    module = Plateau(growth=(4.0, -1.0))
    stopping = EarlyStopping("val/w", mode="max", patience=1)
    run = trainer(tmp_path, [ema, stopping], max_epochs=9)
    run.fit(module, steps(1), steps(1))
    assert stopping.best_score.item() == 2.5
    assert run.lr_scheduler_configs[0].scheduler.best == 2.5


def test_the_score_that_is_logged_is_that_of_the_merged_weights(package: ModuleType, tmp_path: Path) -> None:
    ema = EMA(decay=0.8, validate="both")
    run = trainer(tmp_path, [ema], package=package, max_epochs=2)
    module = of(NetParts, package)(norm=True)
    run.fit(module, batches(4), validation())
    assert run.callback_metrics["val/loss"].item() == score(module.state_dict(), norm=True)
    assert run.callback_metrics["raw/val/loss"].item() == score(ema.raw_weights(), norm=True)


def test_several_validation_loaders_keep_their_names_behind_the_prefix(tmp_path: Path) -> None:
    class Many(Walk):
        def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
            self.log("val/w", self.w.detach().sum())

    run = trainer(tmp_path, [EMA(decay=0.5, validate="both")], max_epochs=1)
    run.fit(Many(), steps(2), [steps(1), steps(1)])
    assert {key: value.item() for key, value in run.callback_metrics.items()} == {
        "val/w/dataloader_idx_0": 1.25,
        "val/w/dataloader_idx_1": 1.25,
        "raw/val/w/dataloader_idx_0": 2.0,
        "raw/val/w/dataloader_idx_1": 2.0,
    }


def test_a_logger_gets_every_key_once_per_validation_at_its_step(tmp_path: Path) -> None:
    class Rows(DummyLogger):
        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.rows.append((step, set(metrics) - {"epoch"}))

    def rows(*callbacks: Callback) -> list[tuple[int, set[str]]]:
        logger = Rows()
        logger.rows = []
        settings = {"logger": logger, "max_epochs": 2, "log_every_n_steps": 1, "val_check_interval": 2}
        trainer(tmp_path, callbacks, **settings).fit(Net(), batches(4), validation())
        return logger.rows

    plain = rows()
    merging = rows(EMA(decay=0.5, validate="both", log_health=False))
    assert [(step, keys) for step, keys in merging if "raw/val/loss" not in keys] == plain
    assert [step for step, keys in merging if keys == {"raw/val/loss"}] == [1, 3, 5, 7]
    assert [step for step, keys in merging if keys == {"val/loss"}] == [1, 3, 5, 7]


def test_metrics_that_are_logged_as_objects_belong_to_their_own_set(tmp_path: Path) -> None:
    class Measured(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.mean = torchmetrics.MeanMetric()

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.mean(self.w.detach())
            self.log("val/w", self.mean)

    metrics = Metrics()
    averages = [EMA(decay=0.5, validate="both"), SWA(start_epoch=2)]
    trainer(tmp_path, [*averages, metrics], max_epochs=2).fit(Measured(), steps(2), steps(3))
    assert metrics.validations[-1] == {"val/w": 3.0625, "raw/val/w": 4.0, "swa/val/w": 4.0}


def test_values_logged_by_callbacks_belong_to_the_set_that_they_saw(tmp_path: Path) -> None:
    class Logging(Callback):
        def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            pl_module.log_dict({"seen": pl_module.w.detach().sum()})

    run = trainer(tmp_path, [EMA(decay=0.5, validate="both"), Logging()], max_epochs=1)
    run.fit(Walk(), steps(2), steps(1))
    assert run.callback_metrics["seen"].item() == 1.25
    assert run.callback_metrics["raw/seen"].item() == 2.0


def test_both_sets_can_be_read_at_any_time(tmp_path: Path) -> None:
    class Reading(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            self.read = ema.raw_weights()["w"].item(), ema.merged_weights()["w"].item(), pl_module.w.item()

    ema, reading = EMA(decay=0.5), Reading()
    assert ema.merged_weights() is None
    trainer(tmp_path, [ema, reading], max_epochs=1).fit(Walk(), steps(2), steps(1))
    assert reading.read == (2.0, 1.25, 1.25)


def test_bars_and_summaries_do_not_mind_more_than_one_validation(tmp_path: Path, package: ModuleType) -> None:
    settings = {"enable_progress_bar": True, "enable_model_summary": True, "num_sanity_val_steps": 1}
    averages = [EMA(decay=0.5, validate="both"), SWA(start_epoch=1)]
    run = trainer(tmp_path, averages, package=package, max_epochs=2, **settings)
    run.fit(of(NetParts, package)(norm=True), batches(4), validation())
    assert [average.updates for average in averages] == [8, 2]


def test_a_network_that_keeps_its_own_copy_of_the_weights_is_an_error(tmp_path: Path) -> None:
    class Frozen(nn.Linear):
        """Like a graph that was compiled with the weights as constants."""

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.constants = values(self)
                return super().forward(x)
            return nn.functional.linear(x, self.constants["weight"], self.constants["bias"])

    class Cached(Net):
        def __init__(self) -> None:
            super().__init__()
            self.net = Frozen(4, 1)

    with pytest.raises(RuntimeError, match="output is the same under both"):
        trainer(tmp_path, [EMA(decay=0.8)], max_epochs=2).fit(Cached(), batches(4), validation())


def test_validation_that_writes_to_the_raw_weights_is_an_error(tmp_path: Path) -> None:
    class Writing(Walk):
        def on_train_start(self) -> None:
            self.alias = self.w.detach()

        def on_validation_end(self) -> None:
            self.alias.add_(1)

    with pytest.raises(RuntimeError, match="not those before"):
        trainer(tmp_path, [EMA(decay=0.5)], max_epochs=1).fit(Writing(), steps(2), steps(1))


def test_a_full_file_that_is_saved_after_the_fit_goes_on_with_the_run(tmp_path: Path) -> None:
    ema, module = EMA(decay=0.5), Walk()
    run = trainer(tmp_path, [ema], max_epochs=1)
    run.fit(module, steps(2), steps(1))
    run.save_checkpoint(tmp_path / "after.ckpt")
    file = read(tmp_path / "after.ckpt")
    assert (file["state_dict"]["w"].item(), raw_of(file)["w"].item()) == (1.25, 2.0)
    resumed, again = Walk(), EMA(decay=0.5)
    trainer(tmp_path, [again], max_epochs=2).fit(resumed, steps(2), steps(1), ckpt_path=tmp_path / "after.ckpt")
    assert (resumed.w.item(), again.updates) == (3.0625, 4)
