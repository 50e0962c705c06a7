"""Statistics that a task is weighed by when it is merged: measured at its end, on the batches that are kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge.callbacks._importance_run._fisher import FisherPass
from lightning_merge.callbacks._importance_run._grams import GramPass
from lightning_merge.callbacks._lightning._batch_copies import BatchCopy
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.combiners import Combiner
from lightning_merge.combiners._with_statistics import WithStatistics
from lightning_merge.importance import Statistics

SAMPLES = 1024
"""At most so many over all processes, of the batches that are kept."""


def measures(combiner: Combiner, title: int | str) -> str | None:
    """The kind of statistics that has to be measured of a task; ``None`` if none has."""
    if isinstance(combiner, WithStatistics) and title not in combiner.statistics:
        return combiner.kinds[0]
    return None


def prepare(
    trainer: Any, module: LightningModule, combiner: Combiner, kind: str, names: list[str], recent: RecentBatches
) -> RecentBatches:
    """Has the step tried with the first batch, besides what it is tried for already; the same batches, to measure on.

    Raises:
        ValueError: If it cannot be measured by the module's step.
    """
    own, first = recent.beside(), recent.trial
    if kind == "fisher":
        _fisher(combiner).prepare(trainer, module, lambda live: _trained(live, names), own)
    else:
        _grams(combiner).prepare(trainer, module, _named(module, names), own)
    second = own.trial

    def both(copy: BatchCopy) -> None:
        for trial in (first, second):
            if trial is not None:
                trial(copy)

    recent.trial, own.trial = both, None
    return own


def measured(
    trainer: Any, module: LightningModule, combiner: Combiner, kind: str, names: list[str], recent: RecentBatches
) -> Statistics:
    """Those of the live weights, of the parameters that are merged. All processes must call this.

    Raises:
        ValueError: If they hold a NaN, or are all zero.
    """
    held, samples = _named(module, names), -(-SAMPLES // trainer.world_size)
    if kind == "fisher":
        with _with_gradients(held):
            squared = _fisher(combiner).measured(trainer, module, held, recent, samples)
        return Statistics.of(module, "fisher", squared.means, samples=squared.samples, labels="true")
    grams, count = _grams(combiner).measured(trainer, module, held, recent, samples)
    return Statistics.of(module, "gram", grams.means(), samples=count, left_out=grams.left_out)


def _fisher(combiner: Combiner) -> FisherPass:
    cure = "Choose another preset, or give `statistics` to the combiner."
    return FisherPass("ContinualMerging", f"`{type(combiner).__name__}`", cure)


def _grams(combiner: Combiner) -> GramPass:
    return GramPass(f"`{type(combiner).__name__}`")


def _named(module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    live = weights.named_parameters(module)
    return {name: live[name] for name in names if name in live}


def _trained(module: nn.Module, names: list[str]) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in _named(module, names).items() if parameter.requires_grad}


@contextmanager
def _with_gradients(held: Mapping[str, Tensor]) -> Iterator[None]:
    """Also what is frozen now has statistics: the other tasks have some of it."""
    before = {name: tensor.requires_grad for name, tensor in held.items()}
    for tensor in held.values():
        tensor.requires_grad_(True)
    try:
        yield
    finally:
        for name, tensor in held.items():
            tensor.requires_grad_(before[name])
