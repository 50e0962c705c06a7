"""Combiners that keep the plain sum of the vectors."""

from collections.abc import Sequence
from typing import Any

from lightning_merge.combiners._kept import Kept
from lightning_merge.combiners._pieces import library_of
from lightning_merge.weights import State, Weights, add_


class Additive(Kept):
    """A sum, and a factor at the end: what goes in can be taken out again."""

    @property
    def removable(self) -> bool:
        return True

    def _fold_all(self, kept: Weights, vector: Weights) -> None:
        add_(kept, vector)

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        add_(state["kept"], vector, -1.0)

    def _merge(self, out: Any, values: Sequence[Any]) -> Any:
        add = library_of(out).add
        add(*values[:2], out=out)
        for new in values[2:]:
            add(out, new, out=out)
        return out
