"""Combiners that keep one number per parameter."""

from abc import abstractmethod
from typing import Any, ClassVar

import torch

from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._vectors import check_finite, check_vector
from lightning_merge.weights import State, Weights, array, empty, in_threads, nonfinite, part, parts, scaled, zeros


class Elementwise(Combiner):
    """A fold per parameter over its value in each vector, and a factor at the end.

    A rule says what one step does to a piece of the weights. Pieces are small enough to stay in the cache and are
    shared out to the threads; they are arrays of NumPy on the CPU and tensors elsewhere.
    """

    shows_nan: ClassVar[bool] = True
    """Whether a NaN in any vector is one in what is kept."""

    @abstractmethod
    def _step(self, kept: Any, new: Any, count: int) -> None:
        """Takes one more vector into what is kept, in place; ``count``, at least 1, is how many came before."""

    @abstractmethod
    def _factor(self, count: int) -> float:
        """What the kept numbers are multiplied by after so many vectors."""

    def init(self, like: Weights) -> State:
        return {"kept": zeros(like), "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        kept: Weights = state["kept"]
        in_threads(lambda where: self._fold(part(kept, where), part(vector, where), state["updates"]), parts(kept))

    def _fold(self, kept: Weights, vector: Weights, count: int) -> None:
        for name, tensor in kept.items():
            old, new = array(tensor), array(vector[name].to(tensor))
            if count:
                self._step(old, new, count)
            else:
                old[...] = new

    def result(self, state: State) -> Weights | None:
        return scaled(state["kept"], self._factor(state["updates"])) if state["updates"] else None

    def _combine_parts(self, vectors: list[tuple[int | str, Weights]]) -> Weights:
        for task, vector in vectors:
            check_vector(vector, vectors[0][1], task)
        merged = empty(vectors[0][1])
        factor = self._factor(len(vectors))

        def combine(where: dict[str, slice]) -> None:
            target = part(merged, where)
            for count, (task, vector) in enumerate(vectors):
                piece = part(vector, where)
                if not self.shows_nan:
                    check_finite(piece, task)
                self._fold(target, piece, count)
            if self.shows_nan and nonfinite(target):  # or too large for its type, which is no error of a vector
                for task, vector in vectors:
                    check_finite(part(vector, where), task)
            if factor != 1:
                for tensor in target.values():
                    values = array(tensor)
                    values *= factor

        in_threads(combine, parts(merged))
        return merged
