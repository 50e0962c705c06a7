"""Runs of two processes of which there are golden files: sharded parameters, and a branch in each process."""

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from golden.runs import Plain, Tiny, Witness, data, quiet, standing
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_merge import callbacks as merging

SHARDED, PER_PROCESS = "parts.ckpt", "branches-step=7.ckpt"
"""A folder that two processes wrote, and a file of a run with a branch in each of two."""


def sharded(folder: Path, epochs: int, ckpt_path: Path | None) -> dict[str, Any]:
    """A run under FSDP2 in this process and its peer. The run of one epoch writes ``SHARDED`` at its end."""
    callbacks: list[Any] = [merging.EMA(0.8), merging.SWA(start_epoch=0), merging.LAWA(k=2, every_n_steps=1)]
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    strategy = ModelParallelStrategy(
        data_parallel_size=world, tensor_parallel_size=1, process_group_backend="gloo", timeout=timedelta(seconds=60)
    )
    file = ModelCheckpoint(folder, "parts", monitor="val/loss")
    share = torch.utils.data.Subset(data(), range(rank, 16, world))
    return _together(folder, Plain(), strategy, callbacks, [file] * (epochs == 1), share, epochs, ckpt_path)


def per_process(folder: Path, epochs: int, ckpt_path: Path | None) -> dict[str, Any]:
    """A run with one branch here and one in the peer. The run of two epochs writes ``PER_PROCESS`` on its way."""
    callbacks: list[Any] = [merging.Lookaround(2, 3)]
    strategy = merging.BranchStrategy(process_group_backend="gloo", timeout=timedelta(seconds=60))
    file = ModelCheckpoint(folder, "branches-{step}", every_n_train_steps=7, save_top_k=-1)
    return _together(folder, Tiny(), strategy, callbacks, [file] * (epochs == 2), data(), epochs, ckpt_path)


def _together(
    folder: Path,
    network: Any,
    strategy: Any,
    callbacks: list[Any],
    files: list[Any],
    samples: Any,
    epochs: int,
    path: Any,
) -> dict[str, Any]:
    torch.manual_seed(3)
    witness = Witness(callbacks)
    trainer = pl.Trainer(
        **quiet(folder) | {"devices": int(os.environ["WORLD_SIZE"])},
        strategy=strategy,
        max_epochs=epochs,
        callbacks=[*callbacks, *files, witness],
        use_distributed_sampler=False,
    )
    loaders = (StatefulDataLoader(each, batch_size=4) for each in (samples, data()))
    trainer.fit(network, *loaders, ckpt_path=path)
    return {"start": witness.started, "saved": witness.saved, "end": standing(network, callbacks)}
