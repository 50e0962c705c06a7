"""Largest magnitude per parameter."""

from dataclasses import dataclass
from typing import Literal, final

import torch

from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._scale import Scale, check_scale, scaled_result
from lightning_merge.weights import State, Weights, zeros


@final
@dataclass(frozen=True)
class MagMax(Combiner):
    """Per parameter the value of the task that moved it furthest: ``scale * v_s``, ``s = argmax_t |v_t|``.

    Made for tasks trained one after the other, each from where the last one ended: their vectors agree in most signs.

    Args:
        scale: In ``(0, 10]``, or shrinking with the number of tasks (``Sum``).
        magmax_tie: Which task wins at equal magnitudes, ``"last"`` (the official code) or ``"first"``.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> import torch
        >>> MagMax(scale=0.5).combine([{"w": torch.tensor([1.0, -4.0])}, {"w": torch.tensor([-3.0, 2.0])}])
        {'w': tensor([-1.5000, -2.0000])}

    References:
        Marczak et al., "MagMax: leveraging model merging for seamless continual learning", ECCV 2024, section 4.
    """

    scale: Scale = 0.5
    magmax_tie: Literal["last", "first"] = "last"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if self.magmax_tie not in ("last", "first"):
            raise ValueError(f'`magmax_tie` must be "last" or "first", got {self.magmax_tie!r}.')

    def init(self, like: Weights) -> State:
        return {"largest": zeros(like), "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        wins = torch.ge if self.magmax_tie == "last" else torch.gt
        for name, kept in state["largest"].items():
            new = vector[name].to(kept)
            kept.copy_(torch.where(wins(new.abs(), kept.abs()), new, kept))

    def result(self, state: State) -> Weights | None:
        return scaled_result(state, "largest", self.scale)
