"""Measuring any weights in the middle of an epoch: ``trainer.validate`` inside a fit would end it."""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule
from torch import Tensor

from lightning_merge._ranks import several
from lightning_merge.callbacks._lightning._user_step import outside_training, transferred

Score: TypeAlias = Callable[[Any, Any], tuple[float | Tensor, float | Tensor]]
"""``score(module, batch)``: the sum of what is to be high over the batch, and the count to divide it by."""


def refuse_without_score(title: str, trainer: Any, module: LightningModule, score: Score | None) -> None:
    """Raises, with what to add.

    Raises:
        ValueError: If nothing says how weights are measured, or there is no data to measure them on.
    """
    if score is None and not hasattr(module, "score_step"):
        raise ValueError(
            f"{title} measures mixtures: define `score_step(self, batch)` on {type(module).__name__}, which returns the"
            " sum of what is to be high over the batch and a count (correct answers and answers, say), or give `score`."
        )
    if _source(trainer, module) is None and not trainer.enable_validation:
        raise ValueError(
            f"{title} measures mixtures on the validation loaders: give the Trainer one and a `validation_step`, or"
            " define `merge_dataloader(self)` on the data module or the module."
        )


def measured(trainer: Any, module: Any, score: Score | None) -> float:
    """Sum over count of what ``score`` or the module's ``score_step`` returns, over all batches and processes.

    The module is in eval mode, without gradients, in the precision of validation; every call draws the same random
    numbers, logs nothing, and leaves modes, buffers, metrics and random states as they were.
    """
    totals = torch.zeros(2, dtype=torch.float64)
    trainer.validating = True
    try:
        with outside_training(trainer, module, attributes=False):
            for batch in _batches(trainer, module):
                with trainer.precision_plugin.val_step_context():
                    parts = module.score_step(batch) if score is None else score(module, batch)
                totals += torch.tensor([float(part) for part in parts], dtype=torch.float64)
    finally:
        trainer.training = True
    if several():
        totals = totals.to(trainer.strategy.root_device)
        dist.all_reduce(totals)
    total, count = totals.tolist()
    return total / count if count else float("nan")


def _source(trainer: Any, module: LightningModule) -> Any:
    owners = (getattr(trainer, "datamodule", None), module)
    return next((owner for owner in owners if hasattr(owner, "merge_dataloader")), None)


def _batches(trainer: Any, module: LightningModule) -> Iterator[Any]:
    source: Any = _source(trainer, module)
    loaders: list[tuple[Iterable[Any], int | float]]
    if source is not None:
        loaders = [(source.merge_dataloader(), float("inf"))]
    else:
        loop = trainer.fit_loop.epoch_loop.val_loop
        loop.setup_data()
        loaders = list(zip(loop._combined_loader.flattened, loop.max_batches, strict=True))
    for number, (loader, most) in enumerate(loaders):
        for batch in islice(loader, None if most == float("inf") else int(most)):
            yield transferred(trainer, module, batch, number)
