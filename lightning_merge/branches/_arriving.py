"""Means over branches that are on their way."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_merge import weights
from lightning_merge.branches._quantised import Bits, blocks, dequantised, mean_of, quantised, row_bytes, unblocked
from lightning_merge.weights import Weights


class Arriving(ABC):
    """A mean that was asked for, and is worked out or received while branches train on."""

    def advance(self) -> None:  # noqa: B027 (most have one part)
        """Begins the second part of the way, if there is one. Every process calls this at the same step."""

    @abstractmethod
    def result(self) -> Weights:
        """The mean by name, waited for, in the precision of averages."""


@final
class Arrived(Arriving):
    """A mean of branches in one process, which need not be waited for."""

    def __init__(self, found: Weights) -> None:
        self._found = found

    def result(self) -> Weights:
        return self._found


@final
class Reduced(Arriving):
    """The mean of processes by one all-reduce.

    Args:
        own: What this process gives.
        count: Number of branches.
        group: The processes that take part.
    """

    def __init__(self, own: Weights, count: int, group: Any) -> None:
        self._own = own
        self._flat = weights.flatten(own).mul_(1 / count)
        self._work = dist.all_reduce(self._flat, group=group, async_op=True) if count > 1 else None

    def result(self) -> Weights:
        if self._work is not None:
            self._work.wait()
            self._work = None
        return weights.unflatten(self._flat, self._own)


@final
class QuantisedMean(Arriving):
    """The mean of processes in few bits: each takes the mean of a share of the blocks and gives it to all.

    On the way there (an all-to-all) and back (an all-gather) numbers have these bits; the mean between is taken in the
    precision of averages. A process sends ``2 (K - 1) / K`` times the numbers, whatever the number K of branches, where
    sending all to all would be ``K - 1`` times.

    Args:
        own: What this process gives.
        bits: 8 or 4.
        count: Number of branches.
        group: The processes that take part.
    """

    def __init__(self, own: Mapping[str, Tensor], bits: Bits, count: int, group: Any) -> None:
        self._own = own
        self._bits: Bits = bits
        self._count = count
        self._group = group
        rows = blocks(own)
        self._dtype = rows.dtype
        self._rows = len(rows)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, -len(rows) % count))
        self._sent = quantised(rows, bits)  # kept until it has left
        self._received = torch.empty_like(self._sent)
        self._is_back = False  # on its way back to all
        self._work: Any = dist.all_to_all_single(self._received, self._sent, group=group, async_op=True)

    def advance(self) -> None:
        if not self._is_back:
            self._work.wait()
            parts = list(self._received.view(self._count, -1, row_bytes(self._bits)).unbind())
            self._sent = mean_of(parts, self._bits, self._dtype)
            self._work = dist.all_gather(parts, self._sent, group=self._group, async_op=True)
            self._is_back = True

    def result(self) -> Weights:
        self.advance()
        self._work.wait()
        rows = dequantised(self._received[: self._rows], self._bits, self._dtype)
        return unblocked(rows, self._own)


def mean_here(sets: list[Weights], bits: Bits) -> Weights:
    """What ``QuantisedMean`` gives, bit for bit, of sets that are all in this process."""
    sent = []
    for each in sets:
        rows = blocks(each)
        sent.append(quantised(rows, bits))
    return unblocked(dequantised(mean_of(sent, bits, rows.dtype), bits, rows.dtype), sets[0])
