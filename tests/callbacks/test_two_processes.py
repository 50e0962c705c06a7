"""Two gloo processes under DDP, with BatchNorm statistics that differ between them."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from processes import launch
from tiny import NetParts, batches, differing, of, read, score, trainer, validation, values
from torch import Tensor

from lightning_merge.callbacks import EMA, SWA, AcceptIfBetter, Doctor, teacher
from lightning_merge.selections import Selection

pytestmark = pytest.mark.multiprocess


class SyncedParts(NetParts):
    """The validation metric is reduced over the processes."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)


class PlainStepsParts(SyncedParts):
    """Without momentum, so a new optimizer goes on where another ended."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Witness(Callback):
    """Writes down, in each process, what the fit left behind."""

    def __init__(self, root: Path, average: Any = None) -> None:
        self.root = root
        self.average = average
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.found["raw"] = values(pl_module)
        self.found.setdefault("path", []).append(self.found["raw"])

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["validated"] = values(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.found["end"] = values(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.found["metrics"] = dict(trainer.callback_metrics)
        if self.average is not None:
            self.found["merged"] = values(self.average.merged_weights())
            self.found["kept raw"] = values(self.average.raw_weights())
        torch.save(self.found, self.root / f"rank{trainer.global_rank}.pt")


class Told(Callback):
    """Hands the witness what judge and doctor found."""

    def __init__(self, judge: AcceptIfBetter, doctor: Doctor) -> None:
        self.judge, self.doctor = judge, doctor

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        (witness,) = (callback for callback in trainer.callbacks if isinstance(callback, Witness))  # type: ignore[attr-defined]
        (scores,) = self.judge.scores.values()
        (found,) = self.doctor.examinations.values()
        witness.found["told"] = {"scores": scores, "line": found.line, "verdict": found.verdict}


def run(
    root: Path,
    *callbacks: Callback,
    average: Any = None,
    epochs: int = 2,
    ckpt_path: Path | None = None,
    module: LightningModule | None = None,
) -> list[dict[str, Any]]:
    """Two processes, forked from this one; returns what each saw."""
    root.mkdir(exist_ok=True)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    callbacks = (*callbacks, Witness(root, average))
    fit = trainer(root, callbacks, strategy=strategy, devices=2, max_epochs=epochs)
    fit.fit(module or of(SyncedParts)(norm=True), batches(8), validation(), ckpt_path=ckpt_path)
    return [torch.load(root / f"rank{rank}.pt") for rank in range(2)]


def averages() -> dict[str, Any]:
    return {
        "average": EMA(decay=0.8, validate="both"),
        "copy": EMA(decay=0.8, validate="both", selection=Selection(buffers="copy")),
        "recompute": SWA(start_epoch=1, validate="both"),
    }


@pytest.mark.parametrize("policy", ["average", "copy", "recompute"])
def test_one_set_is_measured_saved_and_published_whatever_the_buffers(policy: str, tmp_path: Path) -> None:
    average = averages()[policy]
    checkpoint = ModelCheckpoint(tmp_path, "{epoch}", monitor="val/loss", save_top_k=-1)
    first, second = run(tmp_path, average, checkpoint, average=average)
    assert differing(first["raw"], second["raw"]) == ["net.1.running_mean", "net.1.running_var"]
    for moment in ("validated", "end"):
        assert not differing(first[moment], second[moment])
    for key in ("val/loss", "raw/val/loss"):
        assert first["metrics"][key] == second["metrics"][key]

    file = read(tmp_path / "epoch=1.ckpt")
    assert file["lightning_merge"]["measured"] is True
    assert file["lightning_merge"]["score"] == first["metrics"]["val/loss"].item()
    assert not differing(file["state_dict"], first["validated"])
    assert not differing(file["state_dict"], first["end"])
    assert first["metrics"]["val/loss"].item() == pytest.approx(score(file["state_dict"], norm=True), rel=1e-6)


@pytest.mark.parametrize("policy", ["average", "recompute"])
def test_judge_and_doctor_decide_alike_in_every_process_and_the_file_is_what_they_chose(
    policy: str, tmp_path: Path
) -> None:
    average, judge, doctor = averages()[policy], AcceptIfBetter("val/loss", shares=(0.0, 0.5)), Doctor(points=1)
    first, second = run(tmp_path, average, judge, doctor, ModelCheckpoint(tmp_path), Told(judge, doctor))
    assert first["told"] == second["told"]
    scores = first["told"]["scores"]
    assert not differing(first["end"], second["end"])
    file = read(tmp_path / f"{average.name}-final.ckpt")
    assert not differing(file["state_dict"], first["end"])
    assert score(file["state_dict"], norm=True) == pytest.approx(min(scores.values()), rel=1e-6)
    assert first["metrics"]["val/loss"].item() == pytest.approx(min(scores.values()), rel=1e-6)


def test_a_teacher_leaves_training_alike_in_every_process(tmp_path: Path) -> None:
    class Taught(of(SyncedParts)):  # type: ignore[misc]
        def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
            with teacher(self, "ema"):
                target = self(batch[0])
            return super().training_step(batch, batch_idx) + (self(batch[0]) - target).square().mean()

    first, second = run(tmp_path, EMA(decay=0.5), module=Taught(norm=True))
    assert differing(first["raw"], second["raw"]) == ["net.1.running_mean", "net.1.running_var"]
    assert not differing(first["end"], second["end"])


@pytest.mark.parametrize("validate", ["raw", "merged", "both"])
def test_training_is_that_of_a_run_without_the_callback_at_every_step(validate: Any, tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    average = EMA(decay=0.8, validate=validate, selection=Selection(buffers="recompute"))
    merging = run(tmp_path / "merging", average, average=average)
    key = {"raw": "val/loss", "both": "raw/val/loss"}.get(validate)
    for before, after in zip(plain, merging, strict=True):
        paths = zip(before["path"], after["path"], strict=True)
        assert [differing(left, right) for left, right in paths] == [[]] * 8
        assert key is None or before["metrics"]["val/loss"] == after["metrics"][key]


def test_a_resumed_run_trains_on_as_one_without_the_callback(tmp_path: Path) -> None:
    def resumed(folder: str, *average: EMA) -> list[dict[str, Any]]:
        root = tmp_path / folder
        run(root, *(EMA(decay=0.8) for _ in average), ModelCheckpoint(root, save_last=True), epochs=1)
        return run(root, *average, average=average[0] if average else None, ckpt_path=root / "last.ckpt")

    ema = EMA(decay=0.8)
    plain, merging = resumed("plain"), resumed("merging", ema)
    for before, after in zip(plain, merging, strict=True):
        assert not differing(before["raw"], after["raw"])
        assert not differing(before["raw"], after["kept raw"])
    assert not differing(merging[0]["end"], merging[1]["end"])
    whole = run(tmp_path / "whole", EMA(decay=0.8))
    # Lightning keeps the statistics of the first process only; parameters go on bit for bit.
    assert set(differing(whole[0]["end"], merging[0]["end"])) <= {"net.1.running_mean", "net.1.running_var"}


def fit_twice(root: Path) -> list[dict[str, Any]]:
    found = []
    for fits in (1, 2):
        ema, module = EMA(decay=0.8), of(PlainStepsParts)(norm=True)
        for _ in range(fits):
            strategy = DDPStrategy(process_group_backend="gloo")
            settings = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False}
            fit = trainer(root, [ema], max_epochs=2 // fits, **settings)
            fit.fit(module, batches(4, seed=int(os.environ["RANK"])), validation())
        found.append({"steps": ema.steps, "raw": values(ema.raw_weights()), "module": values(module)})
    return found


def test_a_second_fit_continues_the_run_in_every_process(tmp_path: Path) -> None:
    for once, twice in launch(2, fit_twice, tmp_path):
        assert once["steps"] == twice["steps"] == 8
        assert not differing(once["raw"], twice["raw"])
        assert not differing(once["module"], twice["module"])
