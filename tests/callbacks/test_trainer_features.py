"""What a Trainer can be asked for: tuners, debug runs, odd loaders and lengths, every validation interval."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, EarlyStopping, LearningRateFinder, ModelCheckpoint
from lightning.pytorch.tuner import Tuner
from tiny import Net, Walk, WalkParts, batches, differing, of, read, steps, trainer, validation, values
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_merge.callbacks import EMA, SWA, WeightMerging
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNEpochs, EveryNSteps


class Stream(IterableDataset):
    """Batches for ``Walk`` of which no one knows the number."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        yield from [torch.zeros(1)] * self.n


def stream(n: int) -> DataLoader[Tensor]:
    return DataLoader(Stream(n), batch_size=None)


class Seen(Callback):
    """``val/w`` by the applied step at which it was measured."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if "val/w" in trainer.callback_metrics:  # not yet while another average is measured
            self.values[trainer.global_step] = trainer.callback_metrics["val/w"].item()


def halves(*weights: float) -> float:
    """The average with decay 0.5 that starts at 0 and takes these in."""
    average = 0.0
    for weight in weights:
        average += 0.5 * (weight - average)
    return average


def test_the_steps_of_the_learning_rate_finder_are_not_counted(tmp_path: Path) -> None:
    def run(*callbacks: Callback) -> tuple[LightningModule, float]:
        module = Net(lr=0.01)
        finder = LearningRateFinder(min_lr=1e-3, max_lr=1e-1, num_training_steps=5)
        # Its own file is read back with the weights-only loader, which wants nothing but plain types.
        trainer(tmp_path, [finder, *callbacks], max_epochs=1).fit(module, batches(4), validation())
        return module, module.lr

    ema = EMA(decay=0.8)
    plain, rate = run()
    _, merging_rate = run(ema)
    assert rate == merging_rate
    assert (ema.steps, ema.updates) == (4, 4)
    assert not differing(ema.raw_weights(), plain)


def test_the_learning_rate_finder_of_the_tuner_leaves_the_average_empty(tmp_path: Path) -> None:
    ema = EMA(decay=0.5)
    run = trainer(tmp_path, [ema], max_epochs=1)
    module = Walk()
    Tuner(run).lr_find(module, steps(8), steps(1), min_lr=0.5, max_lr=2.0, num_training=5)
    assert (ema.updates, module.w.item()) == (0, 0.0)
    module.lr = 1.0
    run.fit(module, steps(3), steps(1))
    assert (ema.steps, module.w.item()) == (3, halves(1, 2, 3))


def test_the_steps_of_the_batch_size_finder_are_not_counted(tmp_path: Path) -> None:
    class Sized(Net):
        batch_size = 2

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(batches(4).dataset, batch_size=self.batch_size)

        def val_dataloader(self) -> DataLoader[Any]:
            return validation()

    def run(*callbacks: Callback) -> LightningModule:
        module = Sized()
        finder = BatchSizeFinder(max_trials=2, steps_per_trial=2)
        trainer(tmp_path, [finder, *callbacks], max_epochs=1).fit(module)
        assert module.batch_size == 4
        return module

    ema = EMA(decay=0.8)
    plain = run()
    run(ema)
    assert (ema.steps, ema.updates) == (4, 4)
    assert not differing(ema.raw_weights(), plain)


def test_a_fast_dev_run_merges_and_writes_nothing(tmp_path: Path) -> None:
    ema, checkpoint = EMA(decay=0.5, validate="both"), ModelCheckpoint(tmp_path, monitor="raw/val/w")
    module = Walk()
    run = trainer(tmp_path, [ema, checkpoint], fast_dev_run=2)
    run.fit(module, steps(5), steps(1))
    assert module.w.item() == halves(1, 2)
    assert list(tmp_path.iterdir()) == []
    assert ema.final_path is None


@pytest.mark.parametrize("settings", [{}, {"limit_val_batches": 0}])
def test_without_validation_the_average_is_published_all_the_same(settings: dict[str, Any], tmp_path: Path) -> None:
    ema, swa = EMA(decay=0.5, validate="both"), SWA(start_epoch=1, name="swa")
    checkpoint = ModelCheckpoint(tmp_path)
    module = Walk()
    run = trainer(tmp_path, [ema, swa, checkpoint], max_epochs=2, **settings)
    run.fit(module, steps(2), steps(1) if settings else None)
    assert module.w.item() == halves(1, 2, 3, 4)
    assert swa.merged_weights()["w"].item() == 3.0
    label = read(ema.final_path)["lightning_merge"]
    assert (label["holds"], label["measured"], label["metrics"]) == ("ema", False, {})


def test_an_iterable_loader_ends_its_epochs_like_any_other(package: ModuleType, tmp_path: Path) -> None:
    ema, swa = EMA(decay=0.5), SWA(start_epoch=1)
    module = of(WalkParts, package)()
    seen = Seen()
    run = trainer(tmp_path, [swa, ema, seen], package=package, max_epochs=3)
    run.fit(module, stream(2), steps(1))
    # Each epoch is taken in before its own validation.
    assert seen.values == {2: 2.0, 4: 3.0, 6: 4.0}
    assert module.w.item() == 4.0
    assert ema.merged_weights()["w"].item() == halves(1, 2, 3, 4, 5, 6)


def test_a_share_of_a_run_of_unknown_length_is_an_error_and_of_a_known_one_is_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_steps"):
        trainer(tmp_path, [EMA(half_life="10%")], max_epochs=1).fit(Walk(), stream(4))
    ema = EMA(decay=0.5, start_step=0.5)
    trainer(tmp_path, [ema], max_steps=4, max_epochs=None).fit(Walk(), stream(9))
    assert ema.updates == 2


@pytest.mark.parametrize("length", [{"max_steps": 5}, {"max_steps": 5, "max_epochs": 2}])
def test_a_run_that_ends_in_mid_epoch_delivers_its_averages(length: dict[str, int], tmp_path: Path) -> None:
    ema, mean = EMA(decay=0.5), WeightMerging(Mean(), EveryNEpochs(), name="mean")
    module = Walk()
    run = trainer(tmp_path, [ema, mean], **length)
    run.fit(module, steps(3), steps(1))
    assert run.global_step == ema.steps == 5
    assert module.w.item() == halves(1, 2, 3, 4, 5)
    # The ends of the epochs: 3, and 5 where the second was cut short.
    assert mean.merged_weights()["w"].item() == 4.0


def test_swa_of_a_share_of_a_run_given_in_steps(tmp_path: Path) -> None:
    swa = SWA(start_epoch=0.5)
    trainer(tmp_path, [swa], max_steps=8).fit(Walk(), steps(2))
    assert swa.merged_weights()["w"].item() == 6.0  # the mean of 4, 6, 8


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ({"val_check_interval": 0.5}, [2, 4, 6, 8]),
        ({"val_check_interval": 2}, [2, 4, 6, 8]),
        ({"val_check_interval": 3}, [3, 7]),
        ({"val_check_interval": 3, "check_val_every_n_epoch": None}, [3, 6]),
        ({"check_val_every_n_epoch": 2}, [8]),
    ],
)
def test_every_validation_interval_measures_the_average_of_its_moment(
    interval: dict[str, Any], expected: list[int], tmp_path: Path
) -> None:
    seen = Seen()
    module = Walk()
    run = trainer(tmp_path, [EMA(decay=0.5), seen], max_epochs=2, **interval)
    run.fit(module, steps(4), steps(1))
    # The last average is measured at the end if no validation saw it.
    assert seen.values == {step: halves(*range(1, step + 1)) for step in {*expected, 8}}
    assert module.w.item() == halves(*range(1, 9))


def test_a_validation_interval_in_time_measures_the_average_of_its_moment(tmp_path: Path) -> None:
    seen = Seen()
    run = trainer(tmp_path, [EMA(decay=0.5), seen], max_epochs=1, val_check_interval={"seconds": 0.0001})
    run.fit(Walk(), steps(4), steps(1))
    assert seen.values
    assert all(value == halves(*range(1, step + 1)) for step, value in seen.values.items())


def test_an_epoch_average_is_measured_before_it_is_saved_with_validation_in_mid_epoch(tmp_path: Path) -> None:
    seen = Seen()
    checkpoint = ModelCheckpoint(tmp_path, "{step}", monitor="val/w", save_top_k=-1)
    swa = SWA(start_epoch=1)
    run = trainer(tmp_path, [swa, seen, checkpoint], max_epochs=2, val_check_interval=2)
    run.fit(Walk(), steps(4), steps(1))
    # Raw before the first epoch has ended, then the mean of 4, and of 4 and 8.
    assert seen.values == {2: 2.0, 4: 4.0, 6: 4.0, 8: 6.0}
    files = {step: read(tmp_path / f"step={step}.ckpt") for step in (2, 4, 6, 8)}
    assert [files[step]["state_dict"]["w"].item() for step in files] == [2.0, 4.0, 4.0, 6.0]
    assert [files[step]["lightning_merge"]["holds"] for step in files] == ["raw", "swa", "swa", "swa"]


def test_early_stopping_ends_a_run_with_its_average(tmp_path: Path) -> None:
    ema = EMA(decay=0.5)
    module = Walk()
    stopping = EarlyStopping("val/w", mode="min", patience=1)
    trainer(tmp_path, [ema, stopping], max_epochs=9).fit(module, steps(1), steps(1))
    assert module.w.item() == halves(1, 2)


def test_manual_optimisation_is_counted_like_any_other(package: ModuleType, tmp_path: Path) -> None:
    class ManualParts(WalkParts):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()

    ema = EMA(decay=0.5)
    module = of(ManualParts, package)()
    seen = Seen()
    run = trainer(tmp_path, [ema, seen], package=package, max_epochs=1)
    run.fit(module, steps(4), steps(1))
    assert seen.values == {4: halves(1, 2, 3, 4)}
    assert module.w.item() == halves(1, 2, 3, 4)


def test_no_update_in_the_first_epoch_is_a_warning(tmp_path: Path) -> None:
    class Lazy(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

    with pytest.warns(UserWarning, match="no step in the first epoch"):
        trainer(tmp_path, [EMA()], max_epochs=1).fit(Lazy(), steps(2))


def test_an_average_that_is_mostly_its_start_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        trainer(tmp_path, [EMA(decay=0.999)], max_epochs=1).fit(Walk(), steps(10))
    lines = [record.message for record in caplog.records if "weights of the start" in record.message]
    assert len(lines) == 1
    assert "99%" in lines[0]
    assert "decay=0.7943" in lines[0]  # 0.7943 ** 10 is a tenth


def test_the_number_of_an_optimizer_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="optimizer"):
        trainer(tmp_path, [EMA(optimizer=1)], max_epochs=1).fit(Walk(), steps(1))


def test_the_metrics_that_are_logged_are_named_once_at_the_first_validation(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    averages = [EMA(decay=0.5, validate="both"), EMA(decay=0.9, name="slow")]
    run = trainer(tmp_path, averages, max_epochs=1)
    with caplog.at_level(logging.INFO):
        run.fit(Walk(), steps(2), steps(1))
    text = "\n".join(record.message for record in caplog.records)
    for key in ("`val/w`", "`slow/val/w`", "`raw/val/w`"):
        assert text.count(key) == 1
    assert set(run.callback_metrics) == {"val/w", "slow/val/w", "raw/val/w"}


def test_training_of_a_finished_run_goes_on_with_a_longer_trainer(tmp_path: Path) -> None:
    first, checkpoint = EMA(decay=0.5), ModelCheckpoint(tmp_path)
    trainer(tmp_path, [first, checkpoint], max_epochs=1).fit(Walk(), steps(2), steps(1))
    for path in (checkpoint.best_model_path, first.final_path):
        ema, module = EMA(decay=0.5), Walk()
        trainer(tmp_path / "again", [ema], max_epochs=2).fit(module, steps(2), steps(1), ckpt_path=path)
        assert module.w.item() == halves(1, 2, 3, 4)


def test_schedules_see_steps_and_epochs_of_the_whole_run(tmp_path: Path) -> None:
    merging = WeightMerging(Mean(), EveryNSteps(n=2, start=0.5), name="tail")
    module = Walk()
    trainer(tmp_path, [merging], max_epochs=2).fit(module, steps(4))
    assert merging.update_window == (6, 8)
    assert module.w.item() == 7.0
    assert values(module)["w"].item() == 7.0
