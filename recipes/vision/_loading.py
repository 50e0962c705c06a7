"""What the data modules of images share: their loaders, and the check that a model has a head for their classes."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_merge._checks import whole
from lightning_merge.recipes.vision._classifier import Classifier

Batch = tuple[Tensor, Tensor]


def loader(
    dataset: Any, batch_size: int, num_workers: int, collate_fn: Any = None, training: bool = False
) -> DataLoader[Batch]:
    """Loads batches; in training at random, without what is left of an epoch after whole ones."""
    return DataLoader(
        dataset,
        batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def checked_loader(batch_size: int, num_workers: int) -> tuple[int, int]:
    """The two options that every data module of images has, in their range."""
    return whole("batch_size", batch_size, 1), whole("num_workers", num_workers, 0, 10_000)


def check_head(trainer: Trainer | None, classes: int, root: Path) -> None:
    """Raises if a model or its metrics have another number of classes; modules of others are not checked."""
    module = trainer.lightning_module if trainer is not None else None
    if not isinstance(module, Classifier):
        return
    for option, found in (
        ("model.num_classes", module.val_accuracy.num_classes),
        ("model.model.num_classes", getattr(module.model, "num_classes", classes)),
    ):
        if found != classes:
            raise ValueError(
                f"`{option}` is {found}, but {root} has {classes} classes. In the recipes `--model.num_classes"
                f" {classes}` sets the head and the metrics."
            )
