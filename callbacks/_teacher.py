"""The average as a teacher: a forward pass under it inside ``training_step``, without a second module."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from lightning.pytorch import LightningModule

from lightning_merge._checks import instance, text
from lightning_merge.calibration import batch_norm_layers
from lightning_merge.callbacks._lightning._internals import has_trainer
from lightning_merge.callbacks._publication._callback import Published


def teacher(module: LightningModule, name: str) -> AbstractContextManager[None]:
    """Within the block the module holds the weights of an average, in eval mode and without gradients.

    Before and after it everything is the student's: weights, modes, and the graph of a forward pass made before. No
    random numbers are drawn unless the forward pass draws some. Until the average is ready, the raw weights serve.

    Args:
        module: The module that is trained, ``self`` in ``training_step``.
        name: Which average of the Trainer, as ``"ema"``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the Trainer has no average of this name, or its BatchNorm statistics are only measured when it is
            published (``buffers="recompute"``).

    Example:
        >>> class Student(LightningModule):
        ...     def training_step(self, batch, batch_idx):
        ...         with teacher(self, "ema"):
        ...             target = self(batch)
        ...         return (self(batch) - target).square().mean()

    References:
        Tarvainen and Valpola, Mean teachers are better role models, NeurIPS 2017, section 2.
    """
    instance("module", module, LightningModule, "a LightningModule")
    text("name", name, "the name of an average")
    if not has_trainer(module):
        raise ValueError(f"`name` is of an average of the Trainer that trains `module`, got {name!r} and no Trainer.")
    found = {callback.name: callback for callback in module.trainer.callbacks if isinstance(callback, Published)}  # type: ignore[attr-defined]
    if name not in found:
        raise ValueError(
            f"`name` must be that of an average among the Trainer's callbacks, got {name!r}; there are:"
            f" {', '.join(found) or 'none'}."
        )
    average = found[name]
    if average.measures_statistics and batch_norm_layers(module):
        raise ValueError(
            f"{average.title} measures BatchNorm statistics only when it is published, and a teacher is asked at every"
            " step. Give it `Selection(buffers='average')` or `Selection(buffers='copy')`."
        )
    return _in_place(module, average)


@contextmanager
def _in_place(module: LightningModule, average: Published) -> Iterator[None]:
    modes = {part: part.training for part in module.modules()}
    # Flags rather than eval(), in which LoRA layers merge their weights, for one.
    for part in modes:
        part.training = False
    try:
        with torch.no_grad(), average.in_place():
            yield
    finally:
        for part, training in modes.items():
            part.training = training
