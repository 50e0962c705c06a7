"""Uncertainty-based gradient matching."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from lightning_merge._checks import number, settle
from lightning_merge.combiners._scale import Scale, checked_scale, checked_weights, scale_of
from lightning_merge.combiners._squares import WithSquares
from lightning_merge.combiners._with_statistics import Known
from lightning_merge.importance import Statistics
from lightning_merge.importance._statistics import one
from lightning_merge.weights import State, Weights, zeros


@final
@dataclass(frozen=True)
class Daheim(WithSquares):
    """The sum of preconditioned vectors, ``s sum_t (c_t H_t + h) v_t / (s sum_t c_t H_t + h)`` with ``h = p H_0 + d``.

    ``H_t`` are the statistics of task t, of kind ``"fisher"`` or ``"adam"``, and ``H_0`` those of the base: the
    curvatures of their losses, by which the gradients match that are left at the merged model. With ``h`` large it is
    the scaled sum, with ``h = 0`` and ``s = 1`` it is ``Fisher`` without normalisation. One task at scale 1 is that
    task. Where all statistics are zero, and ``h`` too, nothing moves: the base is kept. Tensors that no task has
    statistics of are the plain mean (``without`` lists them).

    A stream is exact with three copies of the weights, whatever the number of tasks.

    Args:
        statistics: Statistics of each task by its label, or the path of their file. In files and lists labels are 0, 1,
            2, ... unless others are given.
        base_statistics: Statistics of the base, or the path of their file; without, ``H_0`` is 0.
        scale: ``s`` in ``(0, 10]``, or shrinking with the number of tasks (``Sum``).
        prior: ``p``, at least 0.
        damping: ``d``, at least 0, in the units of ``H_t``.
        weights: A positive factor ``c_t`` for each task by its label; 1 for tasks not in it.

    Raises:
        TypeError: If ``statistics`` is no mapping from tasks to statistics or paths.
        ValueError: If a value is outside its range, a file holds no statistics of such a kind, or they hold a NaN or
            are all zero; at an update if they are of another model, or missing for this task.

    Example:
        >>> known = {0: Statistics("fisher", {"w": torch.tensor([3.0])}), 1: Statistics("fisher", {"w": torch.ones(1)})}
        >>> Daheim(known, damping=1.0).combine([{"w": torch.tensor([4.0])}, {"w": torch.tensor([2.0])}])
        {'w': tensor([4.])}

    References:
        Daheim et al., "Model merging by uncertainty-based gradient matching", ICLR 2024, equation 12.
    """

    statistics: Known  # type: ignore[assignment]
    base_statistics: Statistics | str | os.PathLike[str] | None = None
    scale: Scale = 1.0
    prior: float = 1.0
    damping: float = 0.0
    weights: Mapping[int | str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.base_statistics is not None:
            settle(self, base_statistics=one("`base_statistics`", self.base_statistics, self.kinds, "Daheim"))
        settle(self, scale=checked_scale(self.scale))
        settle(self, prior=number("prior", self.prior, "[0, inf)"))
        settle(self, damping=number("damping", self.damping, "[0, inf)"))
        settle(self, weights=checked_weights(self.weights))

    def refuse_other_base(self, weights: Mapping[str, Tensor], where: str) -> None:
        if isinstance(self.base_statistics, Statistics):
            self.base_statistics.refuse_other_weights(weights, where)

    def init(self, like: Weights) -> State:
        return {"sum": zeros(like), "weighted": zeros(like), "total": zeros(like), "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        self._refuse_unfit(task, state["sum"])
        for name, total in state["sum"].items():
            new = vector[name].detach().to(total)
            total.add_(new)
            if (weight := self._squares(task, name, total)) is not None:
                weight = weight * self.weights.get(task, 1.0)
                state["total"][name].add_(weight)
                state["weighted"][name].addcmul_(weight, new)

    @torch.no_grad()
    def _merged(self, state: State) -> Weights | None:
        if not state["updates"]:
            return None
        factor, merged = scale_of(self.scale, state["updates"]), {}
        for name, total in state["sum"].items():
            if not self._have(name):
                merged[name] = total / state["updates"]
                continue
            rest = self._rest(name, total)
            below = state["total"][name] * factor + rest
            above = (state["weighted"][name] + rest * total) * factor
            merged[name] = torch.where(below > 0, above / below, 0.0)
        return merged

    def _rest(self, name: str, like: Tensor) -> Tensor:
        """``p H_0 + d``."""
        rest, base = torch.full_like(like, self.damping), self.base_statistics
        if isinstance(base, Statistics):
            found = base.find(name)
            if found is None or found.shape != like.shape:
                shape = "none" if found is None else f"some of shape {tuple(found.shape)}"
                raise ValueError(
                    f"the tasks have statistics of `{name}`, of shape {tuple(like.shape)}, and the base has {shape}:"
                    " measure it there as for the tasks."
                )
            rest += found.to(like) * self.prior
        return rest
