"""The entries of a task vector that are largest in magnitude."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from lightning_merge.weights import array, average_dtype

TopK: TypeAlias = Literal["exact", "official_plus_one"]

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


def kth_largest(tensors: Sequence[Tensor], k: int, scratch: Any = None) -> tuple[float, int]:
    """The k-th largest magnitude of all the tensors together, and how many of the k largest are equal to it.

    Args:
        tensors: What is ranked together.
        k: At most as many as there are numbers.
        scratch: Bytes of memory to work in, an array of NumPy for a single tensor on the CPU; else new memory.

    Example:
        >>> kth_largest([torch.tensor([-3.0, 1.0]), torch.tensor([2.0, -2.0])], k=2)
        (2.0, 1)
    """
    flat = tensors[0].reshape(-1) if len(tensors) == 1 else torch.cat([tensor.reshape(-1) for tensor in tensors])
    values = array(flat.to(average_dtype(flat)))
    if isinstance(values, Tensor):
        top = torch.topk(values.abs(), k, sorted=False).values
        return float(top.min()), int((top == top.min()).sum())
    own = values if len(tensors) > 1 else None if scratch is None else scratch[: values.nbytes].view(values.dtype)
    magnitudes = np.abs(values, out=own)
    # Numbers of one sign are in the order of their bits, and integers are selected twice as fast.
    bits = magnitudes.view(_BITS[magnitudes.dtype])
    bits.partition(len(bits) - k)
    top = magnitudes[len(bits) - k :]
    return float(top[0]), int(np.count_nonzero(top == top[0]))


def trim_level(tensors: Sequence[Tensor], density: float, topk_rule: TopK, scratch: Any = None) -> tuple[float, int]:
    """The magnitude from which on entries are kept, and how many of those that are equal to it.

    Args:
        tensors: What is ranked together.
        density: Share of entries that is kept, in ``(0, 1]``.
        topk_rule: ``"exact"`` keeps ``density * size`` rounded down but at least one, and tensors of zeros (frozen
            ones) among others do not count; ``"official_plus_one"`` keeps one more, and all that equal the last one.
        scratch: As ``kth_largest`` takes it.
    """
    exact = topk_rule == "exact"
    frozen_count = len(tensors) == 1 or not exact
    ranked = [tensor for tensor in tensors if tensor.numel() and (frozen_count or tensor.any())]
    size = sum(tensor.numel() for tensor in ranked)
    if not ranked:
        return 0.0, 0
    level, room = kth_largest(ranked, trim_count(size, density, topk_rule), scratch)
    return level, room if exact else size


def reaching(values: Any, level: float, room: int) -> tuple[Any, int]:
    """A mask of the magnitudes above the level and the first ``room`` of those equal to it; what room is left.

    Args:
        values: Array of NumPy or tensor, of one dimension.
        level: From ``trim_level``.
        room: How many that are equal to it are still kept.

    Example:
        >>> reaching(torch.tensor([1.0, -2.0, 3.0, 2.0]), level=2.0, room=1)
        (tensor([False,  True,  True, False]), 0)
    """
    magnitudes = abs(values)
    mask = magnitudes >= level
    equal = magnitudes == level
    count = int(equal.sum()) if isinstance(equal, Tensor) else int(np.count_nonzero(equal))
    if count > room:
        places = equal.nonzero()
        mask[(places[:, 0] if isinstance(equal, Tensor) else places[0])[room:]] = False
    return mask, max(room - count, 0)


@torch.no_grad()
def ranked_between(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A mask of the entries from rank ``start`` to before ``stop`` by magnitude; of equal ones the first ranks first.

    Example:
        >>> ranked_between(torch.tensor([9.0, -3.0, 2.0, 1.0]), 1, 3)
        tensor([False,  True,  True, False])
    """
    return _first(tensor, stop) & ~_first(tensor, start)


def _first(tensor: Tensor, k: int) -> Tensor:
    """A mask of the k largest magnitudes."""
    if k == 0 or tensor.numel() <= k:
        return torch.full_like(tensor, k > 0, dtype=torch.bool)
    mask, _ = reaching(array(tensor.to(average_dtype(tensor)).reshape(-1)), *kth_largest([tensor], k))
    return torch.as_tensor(mask).view(tensor.shape)
