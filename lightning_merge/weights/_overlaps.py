"""Tensors that overlap in memory and are not the same numbers."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_merge.weights._memory import is_in_memory
from lightning_merge.weights._names import canonical
from lightning_merge.weights._places import Place


def refuse_overlaps(groups: Sequence[Place]) -> None:
    """Raises if two groups overlap in memory: a value cannot have two averages."""
    by_storage: dict[int, list[Place]] = {}
    for place in groups:
        if place.kind != "attribute" and is_in_memory(place.tensor):  # attributes are made anew in a forward pass
            by_storage.setdefault(place.tensor.untyped_storage().data_ptr(), []).append(place)
    for shared in by_storage.values():
        if len(shared) > 1 and not _are_apart(shared):
            _refuse_overlap(shared)


def _are_apart(shared: Sequence[Place]) -> bool:
    ends = sorted((place.tensor.data_ptr(), place.tensor.data_ptr() + _extent(place.tensor)) for place in shared)
    return all(end <= start for (_, end), (start, _) in pairwise(ends))


def _extent(tensor: Tensor) -> int:
    """Bytes from the first number to behind the last."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def _refuse_overlap(shared: Sequence[Place]) -> None:
    # Columns of one matrix lie between each other and are apart all the same, so bytes are counted.
    taken = torch.zeros(shared[0].tensor.untyped_storage().nbytes(), dtype=torch.int16)
    for number, place in enumerate(shared, 1):
        t = place.tensor
        width = t.element_size()
        strides = (*(stride * width for stride in t.stride()), 1)
        own = taken.as_strided((*t.shape, width), strides, t.storage_offset() * width)
        if (other := int(own.max())) > 0:
            raise ValueError(
                f"`{canonical(place.name)}` and `{canonical(shared[other - 1].name)}` overlap in memory and are not the"
                " same numbers, so merged weights cannot take the place of one without changing the other. Let each"
                " have memory of its own, as by `.clone()`."
            )
        own.fill_(number)
