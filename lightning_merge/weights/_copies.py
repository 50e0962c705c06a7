"""Copies of sets of tensors, and memory for them, in the precision averages are kept in."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lightning_merge.weights._memory import is_dense, is_in_memory
from lightning_merge.weights._names import Weights
from lightning_merge.weights._precision import average_dtype

_WORTH_IT = 2**22
"""Bytes from which NumPy asks the system for large pages."""

_LINE = 16
"""Numbers of a cache line: at the start of one a tensor is read fastest."""


@torch.no_grad()
def clone(weights: Mapping[str, Tensor]) -> Weights:
    """A copy of its own storage, in the precision averages are kept in."""
    made = _side_by_side(weights)
    if made:
        torch._foreach_copy_(list(made.values()), [weights[name] for name in made])
    return {
        name: made[name]
        if name in made
        else t.detach().to(average_dtype(t), copy=True, memory_format=torch.preserve_format)
        for name, t in weights.items()
    }


@torch.no_grad()
def in_large_pages(nested: Any) -> Any:
    """A state with its float32 numbers in memory as ``clone`` makes it: those read from a file are all over the place.

    What lies so already, is on a device or in another precision is not copied.
    """
    if isinstance(nested, list):
        return [in_large_pages(item) for item in nested]
    if not isinstance(nested, dict):
        return nested
    own = {key: item for key, item in nested.items() if isinstance(item, Tensor) and item.dtype == torch.float32}
    own = {key: tensor for key, tensor in own.items() if _fits(tensor)}
    made = {} if _lie_side_by_side(list(own.values())) else _side_by_side(own)
    if made:
        torch._foreach_copy_(list(made.values()), list(own.values()))
    return {key: made[key] if key in made else in_large_pages(item) for key, item in nested.items()}


def copies(weights: Mapping[str, Tensor]) -> Weights:
    """A copy of its own storage, in the precision the tensors have."""
    return {name: t.detach().clone() for name, t in weights.items()}


def zeros(weights: Mapping[str, Tensor]) -> Weights:
    """Zeros of the same shapes, in the precision averages are kept in."""
    return {name: t.zero_() for name, t in empty(weights).items()}


@torch.no_grad()
def empty(weights: Mapping[str, Tensor]) -> Weights:
    """Memory for such weights, in the precision averages are kept in; what is in it is undefined."""
    made = _side_by_side(weights)
    return {
        name: made[name] if name in made else torch.empty_like(t, dtype=average_dtype(t), requires_grad=False)
        for name, t in weights.items()
    }


def _side_by_side(weights: Mapping[str, Tensor]) -> Weights:
    """Memory for those in host memory whose average is in float32, if it is much: each with a storage of its own.

    NumPy's comes in large pages, where the system has them. So do many tensors together, which alone would not: an
    update takes up to a fifth less than one in pages of 4 kB, and what is new is there three times as fast.
    """
    found = {name: t for name, t in weights.items() if _fits(t)}
    if sum(t.numel() for t in found.values()) * 4 < _WORTH_IT:
        return {}
    places = list(_places(found.values()))
    memory = np.empty(places[-1].stop + _LINE, np.float32)
    memory = memory[-memory.ctypes.data // 4 % _LINE :]
    return {
        name: torch.from_numpy(memory[place]).as_strided(tensor.shape, tensor.stride())
        for (name, tensor), place in zip(found.items(), places, strict=True)
    }


def _fits(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and is_in_memory(tensor) and tensor.is_cpu
    return plain and average_dtype(tensor) == torch.float32 and is_dense(tensor)


def _places(tensors: Iterable[Tensor]) -> Iterator[slice]:
    start = 0
    for tensor in tensors:
        yield slice(start, start + tensor.numel())
        start += -(-tensor.numel() // _LINE) * _LINE


def _lie_side_by_side(tensors: list[Tensor]) -> bool:
    return all(
        t.data_ptr() == tensors[0].data_ptr() + 4 * place.start
        for t, place in zip(tensors, _places(tensors), strict=True)
    )
