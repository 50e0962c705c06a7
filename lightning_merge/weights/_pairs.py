"""Tensors of two sets, name by name, in as few groups as operations on many tensors take."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_merge.weights._names import Weights

_AT_A_TIME = 2**22
"""Numbers that are converted at a time on a device, for few launches in little memory: 16 MB in float32.

In host memory it is one tensor: there is nothing to launch.
"""


class Pairs(NamedTuple):
    """Tensors of one dtype on one device."""

    names: list[str]
    targets: list[Tensor]
    sources: list[Tensor]
    """As the sets have them, or converted to what the targets are."""


def pairs(target: Weights, source: Mapping[str, Tensor]) -> Iterator[Pairs]:
    """The tensors of ``target`` with those of ``source``; most sets are one group."""
    names, targets = list(target), list(target.values())
    sources = in_order(names, source)
    if alike(targets, sources):
        if names:  # torch refuses empty lists
            yield Pairs(names, targets, sources)
        return
    groups: dict[tuple[torch.dtype, ...], dict[tuple[torch.device, ...], Pairs]] = {}
    for name, value, other in zip(names, targets, sources, strict=True):
        of_dtypes = groups.setdefault((value.dtype, other.dtype), {})
        group = of_dtypes.setdefault((value.device, other.device), Pairs([], [], []))
        group.names.append(name)
        group.targets.append(value)
        group.sources.append(other)
    for group in (group for of_dtypes in groups.values() for group in of_dtypes.values()):
        yield from [group] if alike(group.targets, group.sources) else _converted(group)


def in_order(names: list[str], source: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of these names; of a set that has no others and in this order they are not looked up one by one."""
    return list(source.values()) if list(source) == names else [source[name] for name in names]


def alike(*lists: Sequence[Tensor]) -> bool:
    """Whether all tensors are of one dtype and on one device."""
    tensors = list(chain.from_iterable(lists))
    # A device takes longer to compare than to be told from the host.
    return len(set(map(_dtype, tensors))) <= 1 and (
        all(map(_is_on_cpu, tensors)) or len(set(map(_device, tensors))) <= 1
    )


def _converted(group: Pairs) -> Iterator[Pairs]:
    for start, end in runs(group.targets, 0 if group.targets[0].is_cpu else _AT_A_TIME):
        targets = group.targets[start:end]
        converted = [torch.empty_like(tensor) for tensor in targets]
        torch._foreach_copy_(converted, group.sources[start:end])
        yield Pairs(group.names[start:end], targets, converted)


def runs(tensors: Sequence[Tensor], size: int) -> Iterator[tuple[int, int]]:
    """Where runs of tensors begin and end that hold about so many numbers together, or are one tensor."""
    start = numbers = 0
    for i, tensor in enumerate(tensors):
        if i > start and numbers + tensor.numel() > size:
            yield start, i
            start, numbers = i, 0
        numbers += tensor.numel()
    if start < len(tensors):
        yield start, len(tensors)


_dtype, _device, _is_on_cpu = attrgetter("dtype"), attrgetter("device"), attrgetter("is_cpu")
