"""The entries of a task vector that are largest in magnitude."""

from collections.abc import Sequence
from math import inf
from typing import Any, Literal, TypeAlias

import numpy as np
from torch import Tensor

from lightning_merge.combiners._select import ALL, kth_largest

TopK: TypeAlias = Literal["exact", "official_plus_one"]

PIECE = 2**17
"""Numbers at a time on a CPU: with fewer, calls take longer than what they do; more would leave the cache."""


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
    [(level, room)] = kth_largest(ranked, trim_count(size, density, topk_rule))
    return level, room if exact else ALL


def reaching(values: Any, level: float, room: int) -> tuple[Any, Any, int]:
    """Masks of the positive and of the negative ones that are trimmed to; what room is left.

    Args:
        values: Array of NumPy, of one dimension.
        level: From ``trim_level``: magnitudes above it are kept.
        room: How many that are equal to it are kept too, those that come first.

    Example:
        >>> reaching(np.array([1.0, 2.0, -3.0, 2.0]), level=2.0, room=1)
        (array([False,  True, False, False]), array([False, False,  True, False]), 0)
    """
    level = values.dtype.type(level)
    if not room:
        return values > level, values < -level, 0
    below = np.nextafter(level, values.dtype.type(0))  # of zeros none is positive or negative
    positive, negative = values > below, values < -below
    if room == ALL:
        return positive, negative, room
    places = np.flatnonzero((values == level) | (values == -level))
    positive[places[room:]] = negative[places[room:]] = False
    return positive, negative, max(room - len(places), 0)


def rank_levels(tensor: Tensor, *ks: int) -> list[tuple[float, int]]:
    """For each k the magnitude from which on the k largest of a tensor are, and how many of those equal to it."""
    found = iter(kth_largest([tensor], *(k for k in ks if 0 < k < tensor.numel())))
    return [(inf, 0) if k == 0 else (0.0, ALL) if k >= tensor.numel() else next(found) for k in ks]
