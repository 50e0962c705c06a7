"""Memory: which tensors are the same numbers, and one laid out as another."""

from typing import Any

import torch
from torch import Tensor


def region(tensor: Tensor) -> tuple[Any, ...]:
    """Equal for two tensors that are the same numbers in memory; empty tensors are told apart by identity."""
    if not is_in_memory(tensor):
        return (id(tensor),)
    start = (tensor.device, tensor.data_ptr(), tensor.dtype)
    # A dense tensor is the same numbers in any shape: transposed, or flattened.
    return (*start, tensor.numel()) if is_dense(tensor) else (*start, tensor.shape, tensor.stride())


def view(tensor: Tensor, like: Tensor, other: Tensor) -> Tensor:
    """What ``other``, the same numbers as ``like`` in another shape, becomes when ``like`` becomes ``tensor``."""
    if other.shape == like.shape and other.stride() == like.stride():
        return tensor
    laid = laid_out_as(tensor, like)
    return laid.as_strided(other.shape, other.stride(), laid.storage_offset())


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor if its numbers lie in memory in the order of another's, else a copy that does."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def is_in_memory(tensor: Tensor) -> bool:
    plain = type(tensor.data) is Tensor and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def is_dense(tensor: Tensor) -> bool:
    """Whether its numbers are all that is between the first and the last of them in memory."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((s, n) for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1):
        if stride != expected:
            return False
        expected *= size
    return True
