"""The entries of a task vector that are largest in magnitude."""

from collections.abc import Sequence
from math import inf, sqrt
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from lightning_merge.weights import average_dtype

TopK: TypeAlias = Literal["exact", "official_plus_one"]

ALL = 2**62
"""Room for any number of equal ones."""

_PIECE = 2**16
"""Numbers that are looked at while they stay in the cache."""

_FEW = 2**14
"""Of no more numbers all are in a sample."""

_LINE, _STRIDE = 16, 61
"""Numbers of a line of memory; one of so many lines is in a sample, which is no size that tensors have."""

_BITS = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}


def count_of(share: float, size: int) -> int:
    """``share * size`` rounded down, of a share that was written in decimals.

    Example:
        >>> count_of(0.29, 100), int(0.29 * 100)
        (29, 28)
    """
    return int(share * size + 1e-9)


def trim_count(size: int, density: float, topk_rule: TopK) -> int:
    """How many of so many entries are kept, without others that equal the last one."""
    if topk_rule == "exact":
        return min(max(1, count_of(density, size)), size)
    return min(int(density * size) + 1, size)


def kth_largest(tensors: Sequence[Tensor], k: int) -> tuple[float, int]:
    """The k-th largest magnitude of all the tensors together, and how many equal to it are among the k largest.

    ``ALL`` if all that are equal to it are.

    Args:
        tensors: What is ranked together; on the CPU.
        k: At most as many as there are numbers.

    Example:
        >>> import torch
        >>> kth_largest([torch.tensor([-3.0, 1.0]), torch.tensor([2.0, -2.0])], k=2)
        (2.0, 1)
    """
    arrays = [tensor.detach().to(average_dtype(tensor)).reshape(-1).numpy() for tensor in tensors]
    above, inside = _around(arrays, k)
    rank = len(inside) - (k - above)
    # Numbers of one sign are in the order of their bits, and integers are selected faster.
    inside.view(_BITS[inside.dtype]).partition(rank)
    level = inside[rank]
    room = k - above - int(np.count_nonzero(inside > level))
    return float(level), room if np.count_nonzero(inside == level) > room else ALL


def _around(arrays: Sequence[Any], k: int) -> tuple[int, Any]:
    """How many magnitudes are above a range that holds the k-th largest, and those in the range, as a new array.

    To select from all takes eight times as long as to look at each once: a sample says where to look.
    """
    size, wide = sum(map(len, arrays)), np.result_type(*arrays)
    sample = np.abs(np.concatenate([_sample(values) for values in arrays], dtype=wide))
    low, high = _bounds(sample, k / size)
    above, inside = 0, []
    scratch = np.empty(min(_PIECE, max(map(len, arrays))), wide)
    for values in arrays:
        for start in range(0, len(values), _PIECE):
            piece = values[start : start + _PIECE]
            magnitudes = np.abs(piece, out=scratch[: len(piece)])
            above += int(np.count_nonzero(magnitudes > high))
            within = magnitudes >= low
            within &= magnitudes <= high
            inside.append(magnitudes[np.flatnonzero(within)])
    found = np.concatenate(inside)
    if above < k <= above + len(found):
        return above, found
    return 0, np.abs(np.concatenate(arrays, dtype=wide))


def _sample(values: Any) -> Any:
    """Some of the numbers, a line of memory at a time: any other way all would be read."""
    return (
        values[: len(values) // _LINE * _LINE].reshape(-1, _LINE)[::_STRIDE].ravel() if len(values) > _FEW else values
    )


def _bounds(sample: Any, share: float) -> tuple[Any, Any]:
    """Between which magnitudes that is, of which this share is larger, as far as a sample tells."""
    expected = share * len(sample)
    margin = 6.0 * sqrt(expected * (1.0 - share)) + 4.0
    first, last = len(sample) - 1 - int(expected + margin), len(sample) - 1 - int(expected - margin)
    ranks = sorted({rank for rank in (first, last) if 0 <= rank < len(sample)})
    sample.partition(ranks or 0)
    low = sample[first] if first >= 0 else sample.dtype.type(0)
    return low, sample[last] if last < len(sample) else sample.dtype.type(np.inf)


def trim_level(tensors: Sequence[Tensor], density: float, topk_rule: TopK) -> tuple[float, int]:
    """The magnitude from which on entries are kept, and how many of those that are equal to it, or ``ALL``.

    Args:
        tensors: What is ranked together.
        density: Share of entries that is kept, in ``(0, 1]``.
        topk_rule: ``"exact"`` keeps ``density * size`` rounded down but at least one, and tensors of zeros (frozen
            ones) among others do not count; ``"official_plus_one"`` keeps one more, and all that equal the last one.
    """
    exact = topk_rule == "exact"
    frozen_count = len(tensors) == 1 or not exact
    ranked = [tensor for tensor in tensors if tensor.numel() and (frozen_count or tensor.any())]
    size = sum(tensor.numel() for tensor in ranked)
    if not ranked:
        return 0.0, 0
    level, room = kth_largest(ranked, trim_count(size, density, topk_rule))
    return level, room if exact else ALL


def reaching(magnitudes: Any, level: float, room: int) -> tuple[Any, int]:
    """A mask of those above the level and the first ``room`` of those equal to it; what room is left.

    Args:
        magnitudes: Array of NumPy, of one dimension.
        level: From ``trim_level``.
        room: How many that are equal to it are still kept.

    Example:
        >>> reaching(np.array([1.0, 2.0, 3.0, 2.0]), level=2.0, room=1)
        (array([False,  True,  True, False]), 0)
    """
    mask = magnitudes >= level
    if room == ALL:
        return mask, room
    places = np.flatnonzero(magnitudes == level)
    mask[places[room:]] = False
    return mask, max(room - len(places), 0)


def rank_level(tensor: Tensor, k: int) -> tuple[float, int]:
    """The magnitude from which on the k largest of a tensor are, and how many of those that are equal to it."""
    if k == 0:
        return inf, 0
    return (0.0, ALL) if tensor.numel() <= k else kth_largest([tensor], k)
