"""Exponential moving average over tasks."""

from dataclasses import dataclass
from typing import Any, final

from lightning_merge._checks import number, settle
from lightning_merge.combiners._elementwise import Elementwise
from lightning_merge.combiners._pieces import library_of
from lightning_merge.combiners._scale import Scale, checked_scale, scale_of
from lightning_merge.weights import Weights, lerp_


@final
@dataclass(frozen=True)
class ExponentialAverage(Elementwise):
    """Exponential moving average over tasks: ``mean <- (1 - alpha) * mean + alpha * v``, starting at the first vector.

    The order of the tasks matters: the share of a task shrinks by ``1 - alpha`` with each that follows.

    Args:
        alpha: Share of the newest task, in ``(0, 1]``.
        scale: Multiplies the average; in ``(0, 10]``, or shrinking with the number of tasks (``Sum``).

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> import torch
        >>> ExponentialAverage(alpha=0.25).combine([{"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}])
        {'w': tensor(1.5000)}

    References:
        Marouf et al., "Weighted ensemble models are strong continual learners" (CoMA), ECCV 2024, section 3.
    """

    alpha: float = 0.4
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        settle(self, alpha=number("alpha", self.alpha, "(0, 1]"))
        settle(self, scale=checked_scale(self.scale))

    def _step(self, out: Any, kept: Any, new: Any) -> None:
        step = new - kept
        if self.alpha < 0.5:
            step *= self.alpha
            library_of(out).add(kept, step, out=out)
        else:  # from the nearer end: what is small beside the other one would be lost
            step *= 1.0 - self.alpha
            library_of(out).subtract(new, step, out=out)

    def _fold_all(self, kept: Weights, vector: Weights) -> None:
        lerp_(kept, vector, self.alpha)

    def _factor(self, count: int) -> float:
        return scale_of(self.scale, count)
