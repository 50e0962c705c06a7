"""Means of several sets of weights, and sets mixed with one another in place."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from lightning_merge.weights._names import Weights
from lightning_merge.weights._precision import average_dtype

_CHUNK = 2**17
"""Numbers that are mixed at a time in host memory: as many of every set fit into a core's cache."""


@torch.no_grad()
def weighted_mean(sets: Sequence[Mapping[str, Tensor]], shares: Sequence[float], out: Weights | None = None) -> Weights:
    """``sum(share * set)`` of sets of the same names; new tensors, in the precision averages are kept in.

    A set whose share is 0 is not read, so it may hold NaN. Equal sets give just these weights, without rounding.

    Args:
        sets: At least one.
        shares: One per set, at least 0; their sum is 1.
        out: Where to write them instead of to new tensors.
    """
    mean = {n: torch.empty_like(t, dtype=average_dtype(t)) for n, t in sets[0].items()} if out is None else out
    start, chain = _chain(shares)
    for name, target in mean.items():  # whole tensors: a piece at a time takes longer, at three sets
        _mean_into(target, [tensors[name] for tensors in sets], start, chain)
    return mean


@torch.no_grad()
def mix_(sets: Sequence[Mapping[str, Tensor]], matrix: Sequence[Sequence[float]]) -> None:
    """``set j <- sum over i of matrix[j][i] * set i``, in place: every number is read once and written once.

    Args:
        sets: Tensors of the same names, shapes and strides.
        matrix: A row per set, of numbers of at least 0 that sum to 1. A set whose share is 0 is not read, so it may
            hold NaN. A row that keeps its set as it is writes nothing.
    """
    changing: dict[tuple[float, ...], list[int]] = {}
    for j, row in enumerate(map(tuple, matrix)):
        if row[j] != 1:
            changing.setdefault(row, []).append(j)
    # What is the same for all can be computed in the place of one of them, unless that is too narrow.
    alike = len(changing) == 1
    work = [(*_chain(row, members[0]), members) for row, members in changing.items()]
    for pieces in _pieces(sets):
        in_place = alike and pieces[0].dtype == average_dtype(pieces[0])
        mixed = []
        for start, chain, members in work:
            target = pieces[members[0]] if in_place else torch.empty_like(pieces[0], dtype=average_dtype(pieces[0]))
            _mean_into(target, pieces, start, chain)
            mixed.append(target)
        for target, (_, _, members) in zip(mixed, work, strict=True):
            for j in members:
                if pieces[j] is not target:
                    pieces[j].copy_(target)


def _chain(shares: Sequence[float], first: int = 0) -> tuple[int, list[tuple[int, float]]]:
    """A mean as a chain of lerps, which leaves equal sets as they are: where it starts, then set and weight of each.

    It starts with ``first`` if that has a share, so that the result may take the place of that set.
    """
    order = [i for i in (first, *range(first), *range(first + 1, len(shares))) if shares[i]]
    total = shares[order[0]]
    chain = []
    for i in order[1:]:
        total += shares[i]
        chain.append((i, shares[i] / total))
    return order[0], chain


def _mean_into(target: Tensor, pieces: Sequence[Tensor], start: int, chain: Sequence[tuple[int, float]]) -> None:
    mean = pieces[start] if pieces[start].dtype == target.dtype else pieces[start].to(target.dtype)
    if not chain:
        target.copy_(mean)
    for i, weight in chain:
        piece = pieces[i] if pieces[i].dtype == target.dtype else pieces[i].to(target.dtype)
        mean = torch.lerp(mean, piece, weight, out=target)


def _pieces(sets: Sequence[Mapping[str, Tensor]]) -> Iterator[list[Tensor]]:
    """The same part of every set, one after the other: what is read stays in a cache until it is written."""
    for name, first in sets[0].items():
        flat = [_flat(tensors[name]) for tensors in sets]
        if first.device.type != "cpu" or any(t.dim() != 1 for t in flat):
            yield flat
        else:
            yield from map(list, zip(*(torch.split(t, _CHUNK) for t in flat), strict=True))


def _flat(tensor: Tensor) -> Tensor:
    """The numbers in the order they have in memory, if they are dense; else the tensor as it is."""
    if tensor.is_contiguous():
        return tensor.view(-1)
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return tensor.permute(0, 2, 3, 1).view(-1)
    return tensor
