"""Consensus of task masks."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge._checks import number, settle, whole
from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._scale import Scale, checked_scale, scale_of
from lightning_merge.weights import State, Weights, add_, clone, zeros


@final
@dataclass(frozen=True)
class Consensus(Combiner):
    """The sum of the vectors where enough tasks need it: ``scale * sum_t v_t`` if ``min_tasks`` masks are set, else 0.

    A parameter is in the mask of task t (a TALL mask, of the vector's shapes) if ``|v_t| > threshold * |s - v_t|`` with
    ``s = sum_t v_t``: where equal, or untouched by all, it is in none. While there are fewer tasks than ``min_tasks``
    all of them are enough, so that one task at scale 1 is that task.

    The masks follow from the sum of all vectors, so a stream keeps every vector: T + 1 copies of the weights for T
    tasks (``needs_every_vector``). From files (``combine_files``, ``soup``) it is that of some tensors at a time.

    Args:
        threshold: In ``[0, inf)``; 0.2 to 0.6 in the official search.
        min_tasks: Masks that have to be set, at least 1; 1 drops what no task needs, 2 also what only one does.
        scale: In ``(0, 10]``, or shrinking with the number of tasks (``Sum``).

    Raises:
        TypeError: If ``min_tasks`` is not a whole number.
        ValueError: If a value is outside its range.

    Example:
        >>> rows = [[1.0, 1.0, 0.1], [2.0, 0.0, 1.0]]
        >>> Consensus(scale=1.0).combine([{"w": torch.tensor(row)} for row in rows])
        {'w': tensor([3., 0., 0.])}

    References:
        Wang et al., "Localizing task information for improved model merging and compression", ICML 2024.
    """

    threshold: float = 0.4
    min_tasks: int = 2
    scale: Scale = 0.3

    def __post_init__(self) -> None:
        settle(self, threshold=number("threshold", self.threshold, "[0, inf)"))
        settle(self, min_tasks=whole("min_tasks", self.min_tasks, 1))
        settle(self, scale=checked_scale(self.scale))

    @property
    def needs_every_vector(self) -> bool:
        return True

    def init(self, like: Weights) -> State:
        return {"sum": zeros(like), "vectors": [], "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        add_(state["sum"], vector)
        state["vectors"].append(clone(vector))

    @torch.no_grad()
    def masks(self, state: State) -> list[Weights]:
        """The mask of each task, in the order of the stream: tensors of booleans in the vector's shapes.

        ``mask * sum_t v_t``, added to the base, is the model of a single task in the paper.

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        total: Weights = state["sum"]
        return [{name: self._needs(vector[name], total[name]) for name in total} for vector in state["vectors"]]

    def _needs(self, own: Tensor, total: Tensor) -> Tensor:
        return own.abs() > self.threshold * (total - own).abs()

    @torch.no_grad()
    def _merged(self, state: State) -> Weights | None:
        if not (count := state["updates"]):
            return None
        factor, enough = scale_of(self.scale, count), min(self.min_tasks, count)
        merged: Weights = {}
        for name, total in state["sum"].items():
            votes = torch.zeros_like(total, dtype=torch.int32)
            for vector in state["vectors"]:
                votes += self._needs(vector[name], total)
            merged[name] = torch.where(votes >= enough, total * factor, 0.0)
        return merged
