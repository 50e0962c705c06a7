"""Combiners that keep the plain sum of the vectors."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._elementwise import combine_elementwise, library_of
from lightning_merge.combiners._overflow import narrowed, widened
from lightning_merge.weights import State, Weights, add_, copy_, scaled, zero_, zeros


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

    def _merged(self, state: State) -> Weights | None:
        if not state["updates"]:
            return None
        return narrowed(scaled(state["kept"], self._factor(state["updates"])), state)

    def _make_room(self, state: State, names: list[str], task: int | str) -> None:
        if rest := widened(state, "kept", names):
            super()._make_room(state, rest, task)

    def _combine_parts(self, vectors: list[tuple[int | str, Weights]]) -> Weights:
        return combine_elementwise(vectors, _added, self._factor(len(vectors)))


def _added(out: Any, values: Sequence[Any]) -> Any:
    add = library_of(out).add
    add(*values[:2], out=out)
    for new in values[2:]:
        add(out, new, out=out)
    return out
