"""Combiners that keep the plain sum of the vectors."""

from typing import Any

from lightning_merge.combiners._elementwise import Elementwise, library_of
from lightning_merge.weights import State, Weights, add_, zero_


class Additive(Elementwise):
    """A sum, and a factor at the end: what goes in can be taken out again."""

    @property
    def removable(self) -> bool:
        return True

    def _step(self, out: Any, kept: Any, new: Any) -> None:
        library_of(out).add(kept, new, out=out)

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        if state["updates"] == 1:
            zero_(state["kept"])
        else:
            add_(state["kept"], vector, -1.0)
