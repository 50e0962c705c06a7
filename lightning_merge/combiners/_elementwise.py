"""Combiners that choose or mix, number by number."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from lightning_merge.combiners._kept import Kept
from lightning_merge.weights import Weights, array, in_threads, part, parts, slices

_PART = 2**20
"""Numbers that a thread takes at a time: to hand out few takes as long as to merge them."""


class Elementwise(Kept):
    """A fold per parameter over its value in each vector, and a factor at the end.

    On a CPU a rule says what one step does to a piece of the weights. Pieces are small enough to stay in the cache and
    are shared out to the threads; they are arrays of NumPy, or tensors where NumPy has no such type.
    """

    @abstractmethod
    def _step(self, out: Any, kept: Any, new: Any) -> None:
        """Writes to ``out`` what is kept once a further vector is taken in; ``out`` may be ``kept``."""

    def _merge(self, out: Any, values: Sequence[Any]) -> Any:
        kept = values[0]
        for new in values[1:]:
            self._step(out, kept, new)
            kept = out
        return out

    def _fold_in_pieces(self, kept: Weights, vector: Weights) -> None:
        def fold(share: dict[str, slice]) -> None:
            news = part(vector, share)
            for name, tensor in part(kept, share).items():
                shape = (-1,) if tensor.is_contiguous() else tensor.shape
                old, new = (array(each.detach().to(tensor).reshape(shape)) for each in (tensor, news[name]))
                for where in slices(len(old)) if shape == (-1,) else [slice(None)]:
                    self._step(old[where], old[where], new[where])

        in_threads(fold, parts(kept, size=_PART))
