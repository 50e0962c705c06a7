"""The empirical Fisher information of a module: mean squared gradients of the loss of single samples."""

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_merge import weights
from lightning_merge.callbacks._lightning._batch_copies import BatchCopy
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._user_step import (
    WAYS,
    Way,
    first_way_that_runs,
    names_in_eval,
    outside_training,
    running,
    takes_iterator,
    training_step,
)
from lightning_merge.weights import Weights

_CURE = "Choose `importance='identity'`."


def prepare_fisher(trainer: Any, module: LightningModule, held: Mapping[str, Tensor], recent: RecentBatches) -> None:
    """Refuses a step that gives no loss of a sample, or has it tried with the first batch that is trained on.

    Args:
        trainer: The Trainer.
        module: The module.
        held: The parameters whose information is asked for.
        recent: Where batches are kept.

    Raises:
        ValueError: If ``training_step`` steps optimizers or fetches its batches itself; later, if it does not run.
    """
    reason = "" if module.automatic_optimization else "steps optimizers under manual optimization"
    if takes_iterator(module):
        reason = "takes `dataloader_iter` and fetches its batches itself"
    if reason:
        raise ValueError(
            f"`importance='fisher'` takes the loss of single samples from `training_step`, which {reason}. {_CURE}"
        )

    def attempt(copy: BatchCopy) -> None:
        recent.way = _way(trainer, module, held, recent, copy)

    recent.trial = attempt


def fisher_information(
    trainer: Any, module: LightningModule, held: Mapping[str, Tensor], recent: RecentBatches, samples: int
) -> Weights:
    """Mean over samples of squared gradients of their loss, over all processes; training notices nothing of it.

    Args:
        trainer: The Trainer.
        module: The module; it runs in eval mode if it gives a loss there.
        held: The parameters whose information is asked for.
        recent: The batches. The most recent samples are taken.
        samples: At most so many; at least 1.

    Raises:
        ValueError: If the module's step does not give the loss of a sample.
    """
    total, count = weights.zeros(held), 0
    copies = recent.on(trainer.strategy.root_device)
    if recent.way is None and copies:
        recent.way = _way(trainer, module, held, recent, BatchCopy.of(recent.batches[-1]))
    in_eval = names_in_eval(module) if module.training else frozenset()
    with outside_training(trainer, module):
        for copy in reversed(copies):
            for sample in _single(copy(), samples - count):
                with running(trainer, module, recent.way, in_eval):
                    gradients = _gradients(module, held, sample)
                for square, gradient in zip(total.values(), gradients, strict=True):
                    if gradient is not None:
                        square.addcmul_(gradient.to(square), gradient.to(square))
                count += 1
    fisher = {name: square / max(1, count) for name, square in total.items()}
    weights.mean_over_ranks_(fisher)
    return fisher


def _way(
    trainer: Any, module: LightningModule, held: Mapping[str, Tensor], recent: RecentBatches, copy: BatchCopy
) -> Way:
    in_eval = names_in_eval(module) if module.training else frozenset()

    def attempt(way: Way) -> bool:
        sample = next(_single(copy.on(trainer.strategy.root_device), 1))
        with outside_training(trainer, module), running(trainer, module, way, in_eval):
            _gradients(module, held, sample)
        return True

    found = first_way_that_runs(tuple(way for way in WAYS if way.gradients), attempt)
    if isinstance(found, Exception):
        raise ValueError(
            "`importance='fisher'` takes the loss of single samples from `training_step`, which does not give it"
            f" outside training: {type(found).__name__}: {found}. {_CURE}"
        ) from found
    return found


def _gradients(module: LightningModule, held: Mapping[str, Tensor], sample: Any) -> tuple[Tensor | None, ...]:
    output: Any = training_step(module, sample)
    loss = output["loss"] if isinstance(output, dict) else output
    return torch.autograd.grad(loss, list(held.values()), allow_unused=True)


def _single(batch: Any, most: int) -> Iterator[Any]:
    """Batches of one sample.

    Raises:
        ValueError: If one cannot tell the samples of the batch apart.
    """
    lengths: set[int] = set()

    def measure(tensor: Tensor) -> Tensor:
        lengths.update(tensor.shape[:1])
        return tensor

    apply_to_collection(batch, Tensor, measure)
    if len(lengths) != 1:
        found = f"of lengths {sorted(lengths)}" if lengths else f"none in {type(batch).__name__}"
        raise ValueError(
            "single samples are taken from batches of tensors in dicts, lists and tuples, with one entry for each"
            f" sample along the first dimension, got {found}"
        )
    for index in range(min(lengths.pop(), most)):
        yield apply_to_collection(batch, Tensor, partial(_entry, index=index))


def _entry(tensor: Tensor, index: int) -> Tensor:
    return tensor[index : index + 1] if tensor.dim() else tensor
