"""Kills a stream of tasks at random points, runs it again, and compares the end with the uninterrupted stream.

    python benchmarks/continual_resume.py --points 20 --seed 0 --output benchmarks/results/continual-resume.json

Bit for bit: the bank's files, the merged model, and the matrix of accuracies. A point is a training batch, a test
batch, a checkpoint that is half written, or a step of a write of the bank: before a file is flushed, before it gets its
name. Children are forked from this process, which has torch and Lightning imported.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from resume import cut_writes, main
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_merge.callbacks import ContinualMerging
from lightning_merge.continual import Split
from lightning_merge.recipes import Classifier, Digits, split_by_class
from lightning_merge.recipes.streams._run import run_stream

METHODS = ("magmax", "ema", "sum", "ties", "opcm", "lora-arithmetic")
TASKS, EPOCHS, BATCHES = 3, 2, 3
# At most as many as there are, so that each is met.
EVENTS = {
    "train": TASKS * EPOCHS * BATCHES,
    "test": TASKS * (TASKS + 1),
    "write": TASKS * EPOCHS * 2,
    "bank": TASKS * 12,
}


class Network(Classifier):
    """BatchNorm and dropout; tells of its batches."""

    on_event: Callable[[str], None] = staticmethod(lambda kind: None)  # type: ignore[assignment]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if self.training:  # not when BatchNorm statistics are measured
            self.on_event("train")
        return super().training_step(batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.on_event("test")
        super().test_step(batch, batch_idx)


def stream(method: str, folder: Path, on_event: Callable[[str], None] | None = None) -> None:
    """One stream, from where the folder is; writes ``end.pt``."""
    pl.seed_everything(7, verbose=False)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.2), nn.Linear(144, 10)
    )
    network = Network(model, 10, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.05, momentum=0.9))
    if on_event is not None:
        network.on_event = on_event  # type: ignore[method-assign]
        cut_writes(on_event)
        cut_bank_writes(on_event)
    merging = ContinualMerging(method, folder / "bank")

    def trainer(callbacks: list[pl.Callback]) -> pl.Trainer:
        return pl.Trainer(
            max_epochs=EPOCHS,
            limit_train_batches=BATCHES,
            callbacks=callbacks,
            enable_checkpointing=bool(callbacks),
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )

    tasks = split_by_class(Digits(batch_size=16), Split.of(10, tasks=TASKS, seed=1))
    record = run_stream(network, tasks, merging, folder, trainer, seed=3)
    bank = {path.name: load_file(path) for path in (folder / "bank").glob("*.safetensors")}
    end = {"module": network.state_dict(), "record": record, "bank": bank, "tasks": merging.tasks}
    torch.save(end, folder / "end.pt")


def cut_bank_writes(on_event: Callable[[str], None]) -> None:
    """Makes what precedes a file of the bank an event: its flush, and the change of its name."""
    fsync, replace = os.fsync, Path.replace

    def flush(handle: int) -> None:
        on_event("bank")
        fsync(handle)

    def rename(path: Path, target: Any) -> Path:
        on_event("bank")
        return replace(path, target)

    os.fsync = flush
    Path.replace = rename  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    sys.exit(main(__doc__, METHODS, stream, EVENTS, "streams"))
