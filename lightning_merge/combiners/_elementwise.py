"""Combiners that choose or mix, number by number."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch

from lightning_merge.combiners._kept import Kept
from lightning_merge.weights import Weights, in_threads, part, parts

_PART = 2**20
"""Numbers that a thread takes at a time: to hand out few takes as long as to merge them."""

_PIECE = 2**15
"""Numbers at a time: what torch works on in the thread that calls it."""

_PIECE_OF_ONE = 2**17
"""The same where there is one thread: with fewer, calls take longer than what they do; more would leave the cache."""


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
        size = _PIECE_OF_ONE if torch.get_num_threads() == 1 else _PIECE

        def fold(share: dict[str, slice]) -> None:
            news = part(vector, share)
            for name, tensor in part(kept, share).items():
                own = tensor.detach().contiguous()
                pair = own.view(-1), news[name].detach().to(tensor).reshape(-1)
                for old, new in zip(*(torch.split(each, size) for each in pair), strict=True):
                    self._step(old, old, new)
                if own.data_ptr() != tensor.data_ptr():
                    tensor.copy_(own)

        in_threads(fold, parts(kept, size=_PART))
