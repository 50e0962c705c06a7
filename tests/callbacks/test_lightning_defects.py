"""Fourteen ways in which Lightning's own averaging callbacks go wrong in silence, and that ours do not.

Every test runs one scenario twice: with Lightning's callback, where the defect shows, and with ours, where it does not.
The numbers are exact: ``Walk`` has one weight, which grows by a known amount at every step. If a later Lightning no
longer shows a defect, the test is skipped with a message that says so, after our half has passed.
"""

from pathlib import Path
from typing import Any

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from packaging.version import Version
from tiny import NetParts, Walk, WalkParts, batches, of, read, steps, trainer
from torch import Tensor

from lightning_merge.callbacks import EMA, SWA

CHECKED = Version("2.6.6")
INSTALLED = Version(lightning.pytorch.__version__)


def defect(shown: bool, what: str) -> None:
    """Lightning's half of a test: fails if the defect is not there, or skips if this Lightning may have mended it."""
    if not shown and INSTALLED > CHECKED:
        pytest.skip(f"our half passed; Lightning {INSTALLED} seems to have mended this: {what}")
    assert shown, f"Lightning {INSTALLED} does not show this: {what}"


class Seen(Callback):
    """The ``val/w`` of every validation."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.values.append(trainer.callback_metrics["val/w"].item())


class EpochAveraging(WeightAveraging):
    """Lightning's way to average once per epoch, from its documentation."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


def test_d1_validation_before_the_average_starts_sees_the_trained_weights(tmp_path: Path) -> None:
    def validated(average: Callback) -> list[float]:
        seen = Seen()
        trainer(tmp_path, [average, seen], max_epochs=3).fit(Walk(), steps(2), steps(1))
        return seen.values

    theirs = validated(EMAWeightAveraging(decay=0.5, update_starting_at_step=4))
    ours = validated(EMA(decay=0.5, start_step=4))

    # The average starts as a copy of 4 and takes in 5 and 6.
    assert ours == [2.0, 4.0, 5.25]
    defect(theirs[:2] == [0.0, 0.0], "an average that has not started is validated as the initial weights")


def test_d2_an_average_that_never_starts_leaves_the_trained_model_alone(tmp_path: Path) -> None:
    def final_and_saved(average: Callback) -> tuple[float, float]:
        module = Walk()
        checkpoint = ModelCheckpoint(tmp_path / type(average).__name__)
        trainer(tmp_path, [average, checkpoint], max_epochs=3).fit(module, steps(2), steps(1))
        return module.w.item(), read(checkpoint.best_model_path)["state_dict"]["w"].item()

    theirs = final_and_saved(EMAWeightAveraging(update_starting_at_step=100))
    ours = final_and_saved(EMA(start_step=100))

    assert ours == (6.0, 6.0)
    defect(theirs == (0.0, 0.0), "the trained model and its checkpoint are overwritten with the initial weights")


def test_d3_a_weights_only_file_holds_the_weights_that_were_scored(tmp_path: Path) -> None:
    def score_and_file(average: Callback) -> tuple[float, float]:
        best = ModelCheckpoint(tmp_path / type(average).__name__, monitor="val/w", mode="max", save_weights_only=True)
        trainer(tmp_path, [average, best], max_epochs=3).fit(Walk(), steps(2), steps(1))
        return best.best_model_score.item(), read(best.best_model_path)["state_dict"]["w"].item()

    theirs = score_and_file(EMAWeightAveraging(decay=0.5))
    ours = score_and_file(EMA(decay=0.5))

    assert ours == (5.015625, 5.015625)
    defect(theirs == (5.03125, 6.0), "a weights-only file holds the raw weights under a score of the average")


def test_d4_a_crash_in_validation_leaves_the_raw_weights_live_and_in_the_file(tmp_path: Path) -> None:
    class Crashing(Walk):
        def on_validation_batch_end(self, *args: Any) -> None:
            if self.current_epoch == 1 and not self.resumed:
                raise RuntimeError("the disk is full")

        resumed = False

    def live_and_resumed(average: type[Callback]) -> tuple[float, float]:
        module = Crashing()
        rescue = OnExceptionCheckpoint(tmp_path / average.__name__)
        with pytest.raises(RuntimeError, match="the disk is full"):
            trainer(tmp_path, [average(decay=0.5), rescue], max_epochs=3).fit(module, steps(2), steps(1))

        resumed = Crashing()
        resumed.resumed = True
        again = trainer(tmp_path, [average(decay=0.5)], max_epochs=3)
        again.fit(resumed, steps(2), steps(1), ckpt_path=rescue.ckpt_path)
        return module.w.item(), resumed.w.item()

    def uninterrupted(average: type[Callback]) -> float:
        module = Walk()
        trainer(tmp_path, [average(decay=0.5)], max_epochs=3).fit(module, steps(2), steps(1))
        return module.w.item()

    theirs = live_and_resumed(EMAWeightAveraging)
    ours = live_and_resumed(EMA)

    assert ours == (4.0, uninterrupted(EMA))
    defect(
        theirs[0] < 4.0 and theirs[1] != uninterrupted(EMAWeightAveraging),
        "a crash in validation leaves the average live, and resuming trains the average and averages the raw weights",
    )


def test_d5_validating_does_not_round_the_average_of_a_bfloat16_model(tmp_path: Path) -> None:
    def final(average: Callback, validations: bool) -> float:
        # The weight jumps from 1 to 2; the average follows in steps too small for a bfloat16 near 1.
        module = Walk(growth=(0.0, 1.0, 0.0), start=1.0)
        settings = {"precision": "bf16-true", "max_epochs": 40, "limit_val_batches": int(validations)}
        trainer(tmp_path, [average], **settings).fit(module, steps(1), steps(1))
        assert module.w.dtype is torch.bfloat16
        return module.w.item()

    theirs = [final(EMAWeightAveraging(decay=0.999), validations) for validations in (False, True)]
    ours = [final(EMA(decay=0.999), validations) for validations in (False, True)]

    assert ours == [1.0390625, 1.0390625]
    defect(theirs == [1.0390625, 1.0], "each validation rounds the average to bfloat16, so it never moves")


def test_d6_the_average_of_a_gan_is_updated_whatever_the_cadence(tmp_path: Path) -> None:
    class Gan(Walk):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.discriminator = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch: Tensor, batch_idx: int) -> None:
            for optimizer, weight in zip(self.optimizers(), (self.w, self.discriminator), strict=True):
                optimizer.zero_grad()
                self.manual_backward(-weight.sum())
                optimizer.step()

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD([weight], lr=1.0) for weight in (self.w, self.discriminator)]

    def final(average: Callback) -> float:
        module = Gan()
        trainer(tmp_path, [average], max_epochs=1).fit(module, steps(6))
        return module.w.item()

    theirs = final(EMAWeightAveraging(decay=0.5, update_every_n_steps=2))
    ours = final(EMA(decay=0.5**0.5, every_n_steps=2))

    # 0, then halfway to 2, 4 and 6: every second step of the generator, with the decay of two steps.
    assert ours == pytest.approx(4.25)
    defect(theirs == 0.0, "with two optimizers and an even cadence the average is never updated")


def test_d7_the_file_of_an_epoch_holds_the_average_that_was_scored(tmp_path: Path) -> None:
    def scores_and_files(average: Callback) -> tuple[list[float], list[float]]:
        folder = tmp_path / type(average).__name__
        every = ModelCheckpoint(folder, filename="{epoch}", monitor="val/w", save_top_k=-1)
        trainer(tmp_path, [average, every], max_epochs=3).fit(Walk(), steps(2), steps(1))
        scores = {Path(path).name: score.item() for path, score in every.best_k_models.items()}
        return [scores[name] for name in sorted(scores)], [
            read(folder / name)["state_dict"]["w"].item() for name in sorted(scores)
        ]

    theirs = scores_and_files(EpochAveraging())
    ours = scores_and_files(SWA(start_epoch=1))

    assert ours == ([2.0, 3.0, 4.0], [2.0, 3.0, 4.0])
    defect(theirs == ([0.0, 2.0, 3.0], [2.0, 3.0, 4.0]), "the average of an epoch is scored one epoch late")


def test_d8_the_modules_own_validation_hooks_see_the_merged_weights(tmp_path: Path) -> None:
    class Looking(Walk):
        def on_validation_epoch_start(self) -> None:
            self.looks = [self.w.item()]

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.looks.append(self.w.item())

        def on_validation_epoch_end(self) -> None:
            self.looks.append(self.w.item())

    def looks(average: Callback) -> list[float]:
        module = Looking()
        trainer(tmp_path, [average], max_epochs=1).fit(module, steps(2), steps(1))
        return module.looks

    theirs = looks(EMAWeightAveraging(decay=0.5))
    ours = looks(EMA(decay=0.5))

    assert ours == [1.25, 1.25, 1.25]
    defect(theirs == [1.5, 1.5, 2.0], "`on_validation_epoch_end` of the module runs with the raw weights")


def test_d9_a_second_fit_continues_the_average(tmp_path: Path) -> None:
    def final(average: Callback, fits: int) -> float:
        module = Walk()
        for _ in range(fits):
            trainer(tmp_path, [average], max_steps=6 // fits).fit(module, steps(6 // fits))
        return module.w.item()

    theirs = [final(EMAWeightAveraging(decay=0.5), fits) for fits in (1, 2)]
    ours = [final(EMA(decay=0.5), fits) for fits in (1, 2)]

    assert ours == [5.015625, 5.015625]
    defect(theirs[0] != theirs[1], "a second fit trains the averaged weights and starts a new average")


def test_d10_the_callback_works_in_a_trainer_of_pytorch_lightning(tmp_path: Path) -> None:
    def final(average: Callback) -> float | str:
        module = of(WalkParts, pytorch_lightning)()
        try:
            trainer(tmp_path, [average], package=pytorch_lightning, max_epochs=1).fit(module, steps(2))
        except ValueError as error:
            return str(error)
        return module.w.item()

    theirs = final(EMAWeightAveraging(decay=0.5))
    ours = final(EMA(decay=0.5))

    assert ours == 1.25
    defect(theirs == "Expected a parent", "the callback of one package raises in the Trainer of the other")


def test_d11_swa_averages_the_ends_of_epochs_the_last_one_included(tmp_path: Path) -> None:
    def final(average: Callback) -> float:
        module = Walk(growth=(2.0,))
        trainer(tmp_path, [average], max_epochs=6).fit(module, steps(1))
        return module.w.item()

    theirs = final(StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=3, annealing_epochs=2))
    ours = final(SWA(start_epoch=3, swa_lr=0.5, anneal_epochs=2))

    # The epochs end at 2, 4, 6, 7.5, 8.5, 9.5.
    assert ours == pytest.approx(7.875)  # the mean of the last four
    defect(theirs == pytest.approx(6.5), "the epochs' starts are averaged, and the last epoch never counts")


def test_d12_measuring_batch_statistics_again_takes_no_optimizer_step(tmp_path: Path) -> None:
    class Counting(of(NetParts)):
        applied = 0

        def configure_optimizers(self) -> torch.optim.Optimizer:
            optimizer = super().configure_optimizers()
            optimizer.register_step_post_hook(self.count)
            return optimizer

        def count(self, *args: Any) -> None:
            self.applied += 1

        def on_train_epoch_end(self) -> None:
            self.ends = [*getattr(self, "ends", []), self.net[0].weight.detach().clone()]

    def run(average: Callback) -> Counting:
        module = Counting(norm=True)
        trainer(tmp_path, [average], max_epochs=4).fit(module, batches(8))
        return module

    theirs = run(StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=2, annealing_epochs=1))
    ours = run(SWA(start_epoch=2))

    assert ours.applied == 32
    assert len(ours.ends) == 4
    torch.testing.assert_close(ours.net[0].weight.detach(), torch.stack(ours.ends[1:]).mean(0))
    defect(theirs.applied == 33 and len(theirs.ends) == 5, "an epoch is added, and a step on stale gradients with it")


def test_d13_the_best_file_and_the_last_file_hold_the_average(tmp_path: Path) -> None:
    def final_best_last(average: Callback) -> tuple[float, float, float]:
        module = Walk()
        folder = tmp_path / type(average).__name__
        checkpoint = ModelCheckpoint(folder, monitor="val/w", mode="max", save_last=True)
        trainer(tmp_path, [average, checkpoint], max_epochs=4).fit(module, steps(1), steps(1))
        files = (checkpoint.best_model_path, checkpoint.last_model_path)
        return (module.w.item(), *(read(file)["state_dict"]["w"].item() for file in files))

    theirs = final_best_last(StochasticWeightAveraging(swa_lrs=1.0, swa_epoch_start=2, annealing_epochs=1))
    ours = final_best_last(SWA(start_epoch=2))

    assert ours == (3.0, 3.0, 3.0)  # the mean of 2, 3, 4
    defect(theirs[0] < 4.0 == theirs[1] == theirs[2], "no checkpoint ever holds the average")


def test_d14_stopping_early_still_delivers_the_average(tmp_path: Path) -> None:
    class Stopping(Walk):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = self.current_epoch == 3

    def final(average: Callback) -> float:
        module = Stopping()
        trainer(tmp_path, [average], max_epochs=8).fit(module, steps(1))
        return module.w.item()

    theirs = final(StochasticWeightAveraging(swa_lrs=1.0, swa_epoch_start=2, annealing_epochs=1))
    ours = final(SWA(start_epoch=2))

    assert ours == 3.0
    defect(theirs == 4.0, "the average is dropped without a word when training stops early")
