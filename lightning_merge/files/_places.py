"""Where in a file a tensor is."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where in the file a tensor is, and how to read it. Tied tensors have equal places."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """How many numbers of the file it spans."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def bytes(self) -> int:
        """How many bytes of the file it spans."""
        return self.numbers * self.dtype.itemsize

    @property
    def is_dense(self) -> bool:
        """Whether its numbers lie in their order, without gaps."""
        steps = [math.prod(self.shape[index + 1 :]) for index in range(len(self.shape))]
        return all(a == b or size == 1 for size, a, b in zip(self.shape, self.stride, steps, strict=True))


def memory_of(numbers: Tensor) -> memoryview:
    """The bytes of a tensor of one dimension on the CPU, to be written to."""
    return memoryview(numbers.view(torch.uint8).numpy())  # type: ignore[arg-type]


def place_of(tensor: Any) -> Place:
    """Where a tensor without numbers lies in the file it was read from; ``AttributeError`` if torch did not note it."""
    offset = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if offset is None:
        raise AttributeError("_checkpoint_offset")
    start = offset + tensor.storage_offset() * tensor.element_size()
    return Place(int(start), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
