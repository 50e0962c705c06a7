"""Combiners that keep one number per parameter: what they do to it, in pieces on a CPU and at once elsewhere."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._overflow import narrowed, refuse_overflow, widened
from lightning_merge.combiners._pieces import combine_in_pieces
from lightning_merge.combiners._vectors import check_finite, check_vector
from lightning_merge.weights import State, Weights, clone, copy_, nonfinite, on_host, scale_, scaled, zeros


class Kept(Combiner):
    """A fold over the vectors, and a factor at the end.

    On a CPU a list of vectors is folded in pieces that stay in a cache (``_merge``); elsewhere one vector after the
    other, all of its tensors at once (``_fold_all``), so that operations are few and nothing is read back but whether
    the result is finite.
    """

    @abstractmethod
    def _factor(self, count: int) -> float:
        """What the kept numbers are multiplied by after so many vectors."""

    @abstractmethod
    def _merge(self, out: Any, values: Sequence[Any]) -> Any:
        """Folds all of at least two pieces into ``out``, where any NaN must show; returns it, or what it is in."""

    @abstractmethod
    def _fold_all(self, kept: Weights, vector: Weights) -> None:
        """Takes a further vector, of the dtypes and devices of what is kept, into it; any NaN must show."""

    def init(self, like: Weights) -> State:
        return {"kept": zeros(like), "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        kept: Weights = state["kept"]
        if not state["updates"]:
            copy_(kept, vector)  # a sum with 0 would lose the sign of a zero
        elif on_host(kept):
            self._fold_in_pieces(kept, vector)
        else:
            self._fold_all(kept, as_in(kept, vector))

    def _fold_in_pieces(self, kept: Weights, vector: Weights) -> None:
        """``_fold_all`` on a CPU."""
        self._fold_all(kept, as_in(kept, vector))

    def _merged(self, state: State) -> Weights | None:
        if not state["updates"]:
            return None
        return narrowed(scaled(state["kept"], self._factor(state["updates"])), state)

    def _make_room(self, state: State, names: list[str], task: int | str) -> None:
        if rest := widened(state, "kept", names):
            super()._make_room(state, rest, task)

    def _combine_parts(self, vectors: list[tuple[int | str, Weights]]) -> Weights:
        for task, vector in vectors:
            check_vector(vector, vectors[0][1], task)
        factor = self._factor(len(vectors))
        if on_host(vectors[0][1]):
            return combine_in_pieces(vectors, self._merge, factor)
        merged = self._folded([vector for _, vector in vectors], factor)
        if damaged := nonfinite(merged):
            for task, vector in vectors:
                check_finite(vector, task)
            # A sum may be too large for its type where what follows from it is not.
            wide = [{name: vector[name].double() for name in merged if name in damaged} for _, vector in vectors]
            copy_({name: merged[name] for name in wide[0]}, self._folded(wide, factor))
            refuse_overflow(merged)
        return merged

    def _folded(self, vectors: Sequence[Weights], factor: float) -> Weights:
        merged = clone(vectors[0])
        for vector in vectors[1:]:
            self._fold_all(merged, as_in(merged, vector))
        scale_(merged, factor)
        return merged


def as_in(kept: Weights, vector: Mapping[str, Tensor]) -> Weights:
    """The vector in the dtypes and on the devices of what is kept."""
    return {name: vector[name].detach().to(tensor) for name, tensor in kept.items()}
