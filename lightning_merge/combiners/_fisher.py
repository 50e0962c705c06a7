"""Fisher merging."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import number, one_of, settle
from lightning_merge.combiners._overflow import refuse_overflow
from lightning_merge.combiners._scale import checked_weights
from lightning_merge.combiners._squares import WithSquares
from lightning_merge.combiners._with_statistics import Known
from lightning_merge.weights import State, Weights, zeros


@final
@dataclass(frozen=True)
class Fisher(WithSquares):
    """Per parameter the mean weighted by importance: ``sum_t c_t F_t v_t / sum_t c_t F_t``.

    ``F_t`` are the statistics of task t, of kind ``"fisher"`` or ``"adam"``. Where all are zero nothing moves: the base
    is kept. So one task is that task where its gradient is not zero, and with equal statistics the result is the mean.
    Tensors that no task has statistics of (buffers, frozen parameters) are the plain mean (``without`` lists them).
    Shares are ratios, so that data of another scale for one model would change them; ``normalise`` takes that out.

    A stream is exact with two copies of the weights, the mean and the sum of ``c_t F_t``, whatever the number of tasks.
    No vector can be taken out again: where its task counted most, what is left of the others is rounding.

    Args:
        statistics: Statistics of each task by its label, or the path of their file. In files and lists labels are 0, 1,
            2, ... unless others are given.
        normalise: Whether ``F_t`` is divided by its 2-norm over the whole ``"model"`` (Matena and Raffel), per
            ``"tensor"``, or not at all.
        per: Whether each ``"parameter"`` has its own weight, or all that come into a ``"node"``, a row of the weight,
            have their mean (Fisher-nodes).
        floor: At least 0, in the units of ``F_t`` before it is normalised.
        floor_rule: Whether the floor is ``"added"`` to every ``F_t``, a ``"least"`` value of every one, or of the
            ``"first"`` task only, whose value is then kept where all are zero (the official code, at 1e-6).
        weights: A positive factor ``c_t`` for each task by its label; 1 for tasks not in it.

    Raises:
        TypeError: If ``statistics`` is no mapping from tasks to statistics or paths.
        ValueError: If a value is outside its range, a file holds no statistics of such a kind, or they hold a NaN or
            are all zero; at an update if they are of another model, or missing for this task.

    Example:
        >>> from lightning_merge.importance import Statistics
        >>> known = {0: Statistics("fisher", {"w": torch.tensor([3.0, 1.0, 0.0])})}
        >>> known[1] = Statistics("fisher", {"w": torch.tensor([1.0, 1.0, 0.0])})
        >>> Fisher(known, normalise=None).combine([{"w": torch.tensor([4.0, 4.0, 4.0])}, {"w": torch.zeros(3)}])
        {'w': tensor([3., 2., 0.])}

    References:
        Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022, equation 5. Thennal et al.,
        "Fisher mask nodes for language model merging", LREC-COLING 2024.
    """

    statistics: Known  # type: ignore[assignment]
    normalise: Literal["model", "tensor"] | None = "model"
    per: Literal["parameter", "node"] = "parameter"
    floor: float = 0.0
    floor_rule: Literal["added", "least", "first"] = "added"
    weights: Mapping[int | str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("normalise", self.normalise, ("model", "tensor", None))
        one_of("per", self.per, ("parameter", "node"))
        settle(self, floor=number("floor", self.floor, "[0, inf)"))
        one_of("floor_rule", self.floor_rule, ("added", "least", "first"))
        settle(self, weights=checked_weights(self.weights))

    def init(self, like: Weights) -> State:
        return {"mean": zeros(like), "total": zeros(like), "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        self._refuse_unfit(task, state["mean"])
        for name, mean in state["mean"].items():
            total = state["total"][name]
            weight = self._share(task, name, mean, not state["updates"])
            total.add_(weight)
            mean.lerp_(vector[name].detach().to(mean), torch.where(total > 0, weight / total, 0.0))

    def _share(self, task: int | str, name: str, like: Tensor, is_first: bool) -> Tensor:
        found = self._squares(task, name, like)
        if found is None:
            return torch.ones_like(like)
        size = self._size(task, found)
        if self.per == "node" and found.ndim > 1 and found.numel():
            found = found.flatten(1).mean(1).view(-1, *[1] * (found.ndim - 1)).expand_as(found)
        if self.floor and self.floor_rule == "added":
            found = found + self.floor
        elif self.floor and (is_first or self.floor_rule == "least"):
            found = found.clamp(min=self.floor)
        return found * (self.weights.get(task, 1.0) / size if size else 0.0)

    def _size(self, task: int | str, found: Tensor) -> float:
        if self.normalise == "tensor":
            return float(torch.linalg.vector_norm(found.double()))
        return 1.0 if self.normalise is None else self._of(task).norm

    def _merged(self, state: State) -> Weights | None:
        if not state["updates"]:
            return None
        refuse_overflow(state["total"])
        return dict(state["mean"])
