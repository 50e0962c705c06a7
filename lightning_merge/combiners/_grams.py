"""Sums of input Gram matrices and of what they make of the vectors."""

import math
from abc import abstractmethod
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_merge._checks import number, one_of, settle
from lightning_merge.combiners._with_statistics import WithStatistics
from lightning_merge.importance import Statistics
from lightning_merge.weights import State, Weights, zeros

Normalise = Literal["model", "tensor"] | None


class WithGrams(WithStatistics):
    """A combiner that solves ``W sum_t G_t = sum_t V_t G_t`` for each weight, (out, d), that has Gram matrices (d, d).

    Tensors without are the plain mean. The sums are all that a stream keeps.
    """

    kinds: ClassVar[tuple[str, ...]] = ("gram",)
    off_diagonal: float
    normalise: Normalise

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, off_diagonal=number("off_diagonal", self.off_diagonal, "[0, 1]"))
        one_of("normalise", self.normalise, ("model", "tensor", None))

    @property
    def removable(self) -> bool:
        return True

    @abstractmethod
    def _solved(self, name: str, gram: Tensor, moved: Tensor, state: State) -> Tensor:
        """The weight, flattened to (out, d), from both sums."""

    def init(self, like: Weights) -> State:
        sums = zeros(like)
        grams = {name: t.new_zeros(self._shape(t) if self._have(name) else (0,)) for name, t in sums.items()}
        return {"sum": sums, "gram": grams, "updates": 0}

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        return 2 * (math.prod(tensor.shape[1:]),)

    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        self._refuse_unfit(task, state["sum"])
        self._sum_up(state, vector, task, 1)

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        self._refuse_unfit(task, state["sum"])
        self._sum_up(state, vector, task, -1)

    @torch.no_grad()
    def _sum_up(self, state: State, vector: Weights, task: int | str, sign: int) -> None:
        """Adds a task to the sums, or takes it away."""
        for name, total in state["sum"].items():
            new = vector[name].detach().to(total)
            if self._have(name):
                gram = self._gram(self._of(task), name, state["gram"][name])
                state["gram"][name].add_(gram, alpha=sign)
                new = (new.flatten(1) @ gram).view_as(total)
            total.add_(new, alpha=sign)

    def _gram(self, statistics: Statistics, name: str, like: Tensor) -> Tensor:
        """The matrix of a weight as it is summed up."""
        found = statistics.find(name)
        if found is None:
            raise RuntimeError(f"{statistics.title} hold nothing of `{name}` any more.")
        gram = found.detach().to(like, copy=True)
        if self.normalise is not None:
            size = statistics.norm if self.normalise == "model" else float(torch.linalg.vector_norm(gram.double()))
            gram /= size or 1.0
        diagonal = gram.diagonal().clone()
        gram *= self.off_diagonal
        gram.diagonal().copy_(diagonal)
        return gram

    def _merged(self, state: State) -> Weights | None:
        return {name: self._of_sums(name, state) for name in state["sum"]} if state["updates"] else None

    def _last_result(self, state: State) -> Weights | None:
        merged: Weights = {}
        for name in list(state["sum"]) if state["updates"] else ():
            merged[name] = self._of_sums(name, state)
            for kept in state.values():
                if isinstance(kept, dict):
                    del kept[name]
        return merged

    @torch.no_grad()
    def _of_sums(self, name: str, state: State) -> Tensor:
        total: Tensor = state["sum"][name]
        if self._have(name) and total.numel():
            return self._solved(name, state["gram"][name], total.flatten(1), state).view_as(total)
        mean: Tensor = total / state["updates"]
        return mean
