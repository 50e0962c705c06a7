"""Streams of tasks and banks of which there are golden files."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from golden.runs import Tiny, Witness, loaders, quiet, tensors
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_merge.callbacks import ContinualMerging
from lightning_merge.continual import PRESETS, Bank

TASK, MERGED = "task-step=3.ckpt", "task1-merged.ckpt"
"""A file amid the second task of a stream, and the one that ends it."""

COMBINERS = ("average", "sum", "ties", "dare", "magmax", "ema", "opcm", "wise-ft")


def stream_task(
    task: int, folder: Path, ckpt_path: Path | None = None, keep: Callable[[], Any] | None = None
) -> dict[str, Any]:
    """One task of a stream in ``folder / "bank"``, with a Trainer, a callback and a module of its own.

    Args:
        task: Its index, which is also the seed of its data.
        folder: Where it works.
        ckpt_path: A file of this task to go on from.
        keep: Called right after ``TASK`` was written, amid the task; only with it that is written.
    """
    torch.set_num_threads(1)
    torch.manual_seed(3)
    stream = ContinualMerging("magmax", folder / "bank", keep_vectors=True)
    network = Tiny()
    extra = [] if keep is None else [ModelCheckpoint(folder, "task-{step}", every_n_train_steps=3, save_top_k=-1)]
    trainer = pl.Trainer(**quiet(folder), max_epochs=1, callbacks=[stream, *extra, Witness([], keep, epoch=0)])
    trainer.fit(network, loaders(task)[0], ckpt_path=ckpt_path)
    return {"module": tensors(network), "vector": tensors(stream.merged_vector() or {}), "tasks": stream.tasks}


def vectors() -> Iterator[dict[str, Tensor]]:
    """Task vectors that no training made."""
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        yield {"a": torch.randn(3, 3, generator=generator), "b": torch.randn(3, generator=generator)}


def bank(preset: str, folder: Path) -> Bank:
    return Bank(folder, PRESETS[preset].combiner, keep_vectors=preset == "average")
