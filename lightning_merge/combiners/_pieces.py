"""Several vectors folded at once on a CPU, in pieces that stay in a cache."""

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_merge.combiners._overflow import refuse_overflow
from lightning_merge.combiners._vectors import check_finite
from lightning_merge.weights import Weights, array, empty, in_threads, part, parts

_PIECE = 2**18
"""Numbers at a time: what is written stays in the cache of a core while every vector is read."""


def combine_in_pieces(
    vectors: list[tuple[int | str, Weights]], merge: Callable[[Any, Sequence[Any]], Any], factor: float
) -> Weights:
    """``factor`` times what ``merge(out, values)`` gives for at least two values each, in pieces shared out to threads.

    Between two operations on a piece a thread needs the interpreter, which the others wait for: all else is done for
    many pieces at once.
    """
    merged = empty(vectors[0][1])

    def combine(where: dict[str, slice]) -> None:
        shares = [part(vector, where) for _, vector in vectors]
        for name, tensor in part(merged, where).items():
            shape = (-1,) if tensor.is_contiguous() else tensor.shape
            out = array(tensor.view(shape))
            values = [array(share[name].detach().reshape(shape).to(tensor)) for share in shares]
            for start in range(0, len(out), _PIECE):
                piece = slice(start, start + _PIECE)
                own = [each[piece] for each in values]
                if not _combine(out[piece], own, merge, factor):
                    for share, (task, _) in zip(shares, vectors, strict=True):
                        check_finite(share, task)
                    _combine_widely(out[piece], own, merge, factor)
                    refuse_overflow({name: torch.as_tensor(out[piece])})

    in_threads(combine, parts(merged, size=8 * _PIECE))
    return merged


def _combine(out: Any, values: Sequence[Any], merge: Callable[[Any, Sequence[Any]], Any], factor: float) -> bool:
    """Whether all is finite; what is too large for its type is not, but is no error of a vector either."""
    with np.errstate(all="ignore"):
        kept = merge(out, values) if len(values) > 1 else values[0]
        if kept is not out or factor != 1:
            library_of(out).multiply(kept, factor, out=out)
        return isfinite(out.sum())


def _combine_widely(out: Any, values: Sequence[Any], merge: Callable[[Any, Sequence[Any]], Any], factor: float) -> None:
    """The same in float64: a sum may be too large for its type where what follows from it is not."""
    if isinstance(out, Tensor):
        wide = [value.double() for value in values]
        kept = merge(torch.empty_like(wide[0]), wide) if len(wide) > 1 else wide[0]
        out.copy_(kept * factor)
        return
    wide = [value.astype(np.float64) for value in values]
    with np.errstate(all="ignore"):
        kept = merge(np.empty_like(wide[0]), wide) if len(wide) > 1 else wide[0]
        out[...] = kept * factor


def library_of(values: Any) -> Any:
    """NumPy or torch, whichever it is an array of: both have ``add(x, y, out=z)`` and ``multiply``."""
    return torch if isinstance(values, Tensor) else np
