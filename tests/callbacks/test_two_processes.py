"""Two gloo processes under DDP, with BatchNorm statistics that differ between them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from tiny import NetParts, batches, differing, of, read, score, trainer, validation, values
from torch import Tensor

from lightning_merge.callbacks import EMA, SWA
from lightning_merge.selections import Selection

pytestmark = pytest.mark.multiprocess


class SyncedParts(NetParts):
    """The validation metric is reduced over the processes."""

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]), sync_dist=True)


class Witness(Callback):
    """Writes down, in each process, what the fit left behind."""

    def __init__(self, root: Path, average: Any = None) -> None:
        self.root = root
        self.average = average
        self.found: dict[str, Any] = {}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.found["raw"] = values(pl_module)

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


def run(
    root: Path, *callbacks: Callback, average: Any = None, epochs: int = 2, ckpt_path: Path | None = None
) -> list[dict[str, Any]]:
    """Two processes, forked from this one; returns what each saw."""
    root.mkdir(exist_ok=True)
    strategy = DDPStrategy(start_method="fork", process_group_backend="gloo")
    callbacks = (*callbacks, Witness(root, average))
    fit = trainer(root, callbacks, strategy=strategy, devices=2, max_epochs=epochs)
    fit.fit(of(SyncedParts)(norm=True), batches(8), validation(), ckpt_path=ckpt_path)
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


def test_training_is_that_of_a_run_without_the_callback(tmp_path: Path) -> None:
    plain = run(tmp_path / "plain")
    average = EMA(decay=0.8, validate="raw", selection=Selection(buffers="recompute"))
    merging = run(tmp_path / "merging", average, average=average)
    for before, after in zip(plain, merging, strict=True):
        assert not differing(before["raw"], after["raw"])
        assert before["metrics"]["val/loss"] == after["metrics"]["val/loss"]


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
