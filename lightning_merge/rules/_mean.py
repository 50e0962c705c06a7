"""Uniform mean."""

from dataclasses import dataclass
from typing import ClassVar, final

from torch import Tensor

from lightning_merge.rules._base import Rule
from lightning_merge.rules._resolution import LESS_OFTEN, watch_resolution
from lightning_merge.rules._shares import of_updates
from lightning_merge.weights import State, Weights, clone, lerp_


@final
@dataclass(frozen=True)
class Mean(Rule):
    """Uniform mean of all weights taken in, n of them: ``mean <- mean + (weights - mean) / n``.

    The weights it starts from are no part of it: the first update copies.

    In float32 rounding adds up: after 100,000 updates it is off by 1e-5 of its size where weights near 1 are noisy, and
    by 1.8e-3, a fifth of its distance from the last weights, where they drift by 1e-7 per update
    (``benchmarks/numerics.py``). Of so long a stretch take weights in less often.

    Example:
        >>> import torch
        >>> rule = Mean()
        >>> state = rule.init({"w": torch.tensor(100.0)})
        >>> for value in (4.0, 2.0, 9.0):
        ...     rule.update(state, {"w": torch.tensor(value)})
        >>> rule.result(state)
        {'w': tensor(5.)}

    References:
        Izmailov et al., "Averaging weights leads to wider optima and better generalization" (SWA), UAI 2018,
        algorithm 1.
    """

    callback: ClassVar[str] = "SWA"

    @property
    def can_be_undone(self) -> bool:
        return True

    def init(self, weights: Weights) -> State:
        return {"mean": clone(weights), "updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        state["updates"] += 1
        watch_resolution(self, state["updates"], state["mean"], weights, 1 / state["updates"], LESS_OFTEN)
        lerp_(state["mean"], weights, 1 / state["updates"])

    def shares(self, state: State) -> Tensor:
        return of_updates(1, state["updates"], state["updates"], 1.0 / max(1, state["updates"]))

    def stored(self, state: State) -> Weights | None:
        return state["mean"] if state["updates"] else None
