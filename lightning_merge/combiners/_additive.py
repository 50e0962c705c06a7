"""Combiners that keep the plain sum of the vectors."""

from abc import abstractmethod

import torch

from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._vectors import check_finite, check_vector
from lightning_merge.weights import State, Weights, add_, copy_, empty, part, parts, scaled, zero_, zeros

_SIZE = 2**19
"""Numbers of a part: fewer, and torch's threads wait for each other more than they add."""


class Additive(Combiner):
    """A sum, and a factor at the end: what goes in can be taken out again."""

    @abstractmethod
    def _factor(self, count: int) -> float:
        """What the sum is multiplied by after so many vectors."""

    @property
    def removable(self) -> bool:
        return True

    def init(self, like: Weights) -> State:
        return {"kept": zeros(like), "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        if state["updates"]:
            add_(state["kept"], vector)
        else:
            copy_(state["kept"], vector)  # a sum with 0 would lose the sign of a zero

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        if state["updates"] == 1:
            zero_(state["kept"])
        else:
            add_(state["kept"], vector, -1.0)

    def result(self, state: State) -> Weights | None:
        return scaled(state["kept"], self._factor(state["updates"])) if state["updates"] else None

    def _combine_parts(self, vectors: list[tuple[int | str, Weights]]) -> Weights:
        for task, vector in vectors:
            check_vector(vector, vectors[0][1], task)
        merged = empty(vectors[0][1])
        factor = self._factor(len(vectors))
        for where in parts(merged, size=_SIZE):
            pieces = [part(vector, where) for _, vector in vectors]
            for name, out in part(merged, where).items():
                first, *others = (piece[name].detach().to(out) for piece in pieces)
                torch.add(first, others.pop(0), out=out) if others else out.copy_(first)
                for other in others:
                    out.add_(other)
                if factor != 1:
                    out.mul_(factor)
                if not bool(out.sum().isfinite()):  # or too large for its type, which is no error of a vector
                    for piece, (task, _) in zip(pieces, vectors, strict=True):
                        check_finite(piece, task)
        return merged
