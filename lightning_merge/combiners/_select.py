"""The k-th largest magnitude of many numbers, by looking at each once."""

from collections.abc import Iterator, Sequence
from math import copysign, inf, sqrt
from typing import Any

import numpy as np
from torch import Tensor

from lightning_merge.weights import average_dtype, slices

ALL = 2**62
"""Room for any number of equal ones."""

_FEW = 2**14
"""Of no more numbers all are in a sample."""

_LINE, _STRIDE = 16, 61
"""Numbers of a line of memory; one of so many lines is in a sample, which is no size that tensors have."""

_PIECE = 2**17
"""Numbers that are looked at while they stay in the cache: with fewer, calls take longer than what they do."""

_BITS = {np.dtype(np.float32): np.int32, np.dtype(np.float64): np.int64}


def kth_largest(tensors: Sequence[Tensor], *ks: int) -> list[tuple[float, int]]:
    """For each k the k-th largest magnitude of all the tensors together, and how many equal to it are among the k.

    ``ALL`` if all that are equal to it are.

    Args:
        tensors: What is ranked together; on the CPU.
        ks: Each at least 1 and at most as many as there are numbers.

    Example:
        >>> import torch
        >>> kth_largest([torch.tensor([-3.0, 1.0]), torch.tensor([2.0, -2.0])], 2, 4)
        [(2.0, 1), (1.0, 4611686018427387904)]
    """
    arrays = [tensor.detach().to(average_dtype(tensor)).reshape(-1).numpy() for tensor in tensors]
    return [(float(level), room) for level, room in _selected(arrays, ks)]


def _selected(arrays: Sequence[Any], ks: Sequence[int]) -> list[tuple[Any, int]]:
    """To select from all takes ten times as long as to look at each twice.

    A sample gives a level near the k-th largest. Counting how many are above it tells which way and about how far to go
    from there, and only what lies in between is selected from.
    """
    size = sum(map(len, arrays))
    if size <= _FEW or not ks:
        return [_partitioned(np.abs(np.concatenate(arrays)), k) for k in ks]
    sample = np.abs(np.concatenate([_sample(values) for values in arrays]))
    near = [_near(sample, k / size) for k in ks]
    counts = _count(arrays, [values[place] for values, place in near])
    steps = [(k - count) * len(sample) / size for k, count in zip(ks, counts, strict=True)]
    ranges = [_between(*where, step) for where, step in zip(near, steps, strict=True)]
    found = _extract(arrays, ranges)
    selected = []
    for k, count, step, (low, high) in zip(ks, counts, steps, ranges, strict=True):
        inside = found[(found > low) & (found <= high)] if len(ks) > 1 else found
        above = count if step > 0 else count - len(inside)
        if not above < k <= above + len(inside):
            above, inside = 0, np.abs(np.concatenate(arrays))
        selected.append(_partitioned(inside, k - above))
    return selected


def _partitioned(magnitudes: Any, k: int) -> tuple[Any, int]:
    """``_selected`` of an array that may be written to."""
    rank = len(magnitudes) - k
    # Numbers of one sign are in the order of their bits, and integers are selected faster.
    magnitudes.view(_BITS[magnitudes.dtype]).partition(rank)
    level = magnitudes[rank]
    room = k - int(np.count_nonzero(magnitudes > level))
    return level, room if np.count_nonzero(magnitudes == level) > room else ALL


def _near(sample: Any, share: float) -> tuple[Any, int]:
    """Of a sample what is about as large as that of which this share is larger: sorted; and the place of that."""
    few = np.sort(sample[::_LINE])
    expected = (1.0 - share) * len(few)
    margin = 5.0 * sqrt(expected * share) + 2.0
    low, high = few[np.clip([expected - margin, expected + margin], 0, len(few) - 1).astype(int)]
    inside = np.sort(sample[(sample >= low) & (sample <= high)])
    place = int((1.0 - share) * len(sample)) - int(np.count_nonzero(sample < low))
    return inside, min(max(place, 0), len(inside) - 1)


def _between(near: Any, place: int, steps: float) -> tuple[Any, Any]:
    """Above which and up to which magnitude to look, about so many steps down from that at a place."""
    end = place - (steps + copysign(5.0 * sqrt(abs(steps)) + 4.0, steps))
    if steps > 0:
        return near[int(end)] if end >= 0 else -1.0, near[place]
    return near[place], near[int(end) + 1] if end + 1 < len(near) else inf


def _sample(values: Any) -> Any:
    """Some of the numbers, a line of memory at a time: any other way all would be read."""
    if len(values) <= _FEW:
        return values
    return values[: len(values) // _LINE * _LINE].reshape(-1, _LINE)[::_STRIDE].ravel()


def _count(arrays: Sequence[Any], levels: Sequence[Any]) -> list[int]:
    """How many magnitudes are above each level."""
    above = [0] * len(levels)
    for magnitudes, mask, _ in _pieces(arrays):
        for i, level in enumerate(levels):
            above[i] += int(np.count_nonzero(np.greater(magnitudes, level, out=mask)))
    return above


def _extract(arrays: Sequence[Any], ranges: Sequence[tuple[Any, Any]]) -> Any:
    """The magnitudes that are above the first and up to the second number of a range, of any of the ranges."""
    found = []
    for magnitudes, mask, more in _pieces(arrays):
        inside = np.greater(magnitudes, ranges[0][0], out=mask)
        inside ^= np.greater(magnitudes, ranges[0][1], out=more)
        for low, high in ranges[1:]:
            inside |= (magnitudes > low) & (magnitudes <= high)
        found.append(magnitudes[np.flatnonzero(inside)])
    return np.concatenate(found)


def _pieces(arrays: Sequence[Any]) -> Iterator[tuple[Any, Any, Any]]:
    """Magnitudes of so many that they stay in the cache, and room for two masks of them; overwritten by the next."""
    memory = np.empty(_PIECE, np.result_type(*arrays))
    masks = np.empty((2, _PIECE), bool)
    for values in arrays:
        for where in slices(len(values), _PIECE):
            size = where.stop - where.start
            yield np.abs(values[where], out=memory[:size]), masks[0, :size], masks[1, :size]
