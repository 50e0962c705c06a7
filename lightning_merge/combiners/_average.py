"""Uniform mean of task vectors."""

from dataclasses import dataclass
from typing import final

from lightning_merge.combiners._base import Combiner
from lightning_merge.weights import State, Weights, lerp_, zero_, zeros


@final
@dataclass(frozen=True)
class Average(Combiner):
    """Uniform mean of the task vectors, t of them: ``mean <- mean + (v - mean) / t``.

    Example:
        >>> import torch
        >>> Average().combine([{"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}])
        {'w': tensor(2.)}

    References:
        Wortsman et al., "Model soups", ICML 2022, section 2.
    """

    @property
    def removable(self) -> bool:
        return True

    def init(self, like: Weights) -> State:
        return {"mean": zeros(like), "updates": 0}

    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        lerp_(state["mean"], vector, 1 / (state["updates"] + 1))

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        if state["updates"] == 1:
            zero_(state["mean"])
        else:
            lerp_(state["mean"], vector, -1 / (state["updates"] - 1))

    def result(self, state: State) -> Weights | None:
        return state["mean"] if state["updates"] else None
