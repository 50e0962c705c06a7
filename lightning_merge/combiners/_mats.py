"""Matching models in their task subspaces."""

import os
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import number, one_of, path, settle, whole
from lightning_merge.combiners._conjugate import descended
from lightning_merge.combiners._grams import Normalise, WithGrams
from lightning_merge.combiners._with_statistics import Known
from lightning_merge.weights import State, Weights, zeros


@final
@dataclass(frozen=True)
class MaTS(WithGrams):
    """``RegMean`` by conjugate gradients, which need no inverse and may stop early, near where they start.

    Solves ``W sum_t G_t = sum_t V_t G_t`` for each weight that has Gram matrices (statistics of kind ``"gram"``), the
    others being the plain mean. It stops where the residual's 2-norm is at most ``tolerance`` times that of the right
    side, or after ``iterations``. Matrices without full rank are no matter: in directions that no input has, the result
    is what it started with.

    A stream is exact with two copies of the weights (one if it starts at the base) and d^2 numbers per layer, whatever
    the number of tasks, and takes vectors out again. A product (out, d) x (d, d) per iteration.

    Args:
        statistics: Statistics of each task by its label, or the path of their file. In files and lists labels are 0, 1,
            2, ... unless others are given.
        start: Where it starts: at the plain ``"mean"``, or at the ``"base"``.
        iterations: At least 1.
        tolerance: At least 0; 1e-5 is SciPy's, and the official code's.
        off_diagonal: In ``[0, 1]``, the factor of entries off the diagonal.
        normalise: As for ``RegMean``.
        folder: Where to keep how far each weight's iterations are, every ten seconds and at its end: a merge that was
            killed goes on there to the same bits. Three copies of a weight that is on its way, one of each that is
            done; nobody removes them.

    Raises:
        TypeError: If ``statistics`` is no mapping from tasks to statistics or paths.
        ValueError: If a value is outside its range, a file holds no statistics of such a kind, or they hold a NaN or
            are all zero; at an update if they are of another model, or missing for this task.

    Example:
        >>> from lightning_merge.importance import Statistics
        >>> def gram(*values: float) -> Statistics:
        ...     return Statistics("gram", {"w": torch.diag(torch.tensor(values))})
        >>> mats = MaTS({0: gram(1.0, 1.0), 1: gram(3.0, 1.0)})
        >>> mats.combine([{"w": torch.zeros(1, 2)}, {"w": torch.tensor([[4.0, 4.0]])}])
        {'w': tensor([[3., 2.]])}

    References:
        Tam et al., "Merging by matching models in task parameter subspaces", TMLR 2024, section 4.
    """

    statistics: Known  # type: ignore[assignment]
    start: Literal["mean", "base"] = "mean"
    iterations: int = 100
    tolerance: float = 1e-5
    off_diagonal: float = 1.0
    normalise: Normalise = None
    folder: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is not None:
            settle(self, folder=str(path("folder", self.folder)))
        one_of("start", self.start, ("mean", "base"))
        settle(self, iterations=whole("iterations", self.iterations, 1))
        settle(self, tolerance=number("tolerance", self.tolerance, "[0, inf)"))

    def init(self, like: Weights) -> State:
        state = super().init(like)
        if self.start == "mean":
            state["vectors"] = {name: t if self._have(name) else t.new_zeros(0) for name, t in zeros(like).items()}
        return state

    @torch.no_grad()
    def _sum_up(self, state: State, vector: Weights, task: int | str, sign: int) -> None:
        super()._sum_up(state, vector, task, sign)
        for name, total in state.get("vectors", {}).items():
            if self._have(name):
                total.add_(vector[name].detach().to(total), alpha=sign)

    def _solved(self, name: str, gram: Tensor, moved: Tensor, state: State) -> Tensor:
        begin = torch.zeros_like(moved)
        if self.start == "mean":
            begin = (state["vectors"][name] / state["updates"]).flatten(1)
        return descended(begin, gram, moved, self.tolerance, self.iterations, self.folder)
