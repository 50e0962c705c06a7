"""Exponential moving average over tasks."""

from dataclasses import dataclass
from typing import final

from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._scale import Scale, check_scale, scaled_result
from lightning_merge.weights import State, Weights, lerp_, zeros


@final
@dataclass(frozen=True)
class ExponentialAverage(Combiner):
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
        if not 0.0 < self.alpha <= 1.0:
            raise ValueError(f"`alpha` must be in (0, 1], got {self.alpha}.")
        check_scale(self.scale)

    def init(self, like: Weights) -> State:
        return {"mean": zeros(like), "updates": 0}

    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        lerp_(state["mean"], vector, self.alpha if state["updates"] else 1.0)

    def result(self, state: State) -> Weights | None:
        return scaled_result(state, "mean", self.scale)
