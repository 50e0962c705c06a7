"""The last training batches, kept for measuring BatchNorm statistics again."""

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor


class RecentBatches:
    """Copies of the most recent training batches in host memory, up to a number of batches and of bytes.

    They stand in for a second pass over the training loader, which would consume random numbers, disturb a loader with
    persistent workers, and cost an epoch.

    Args:
        kept: Batches that are kept already, oldest first.
        batches: Batches to keep; at least 1.
        bytes: Most memory they may take. The newest batch is always kept, whatever its size.
    """

    def __init__(self, kept: Iterable[Any] = (), *, batches: int = 32, bytes: int = 256 * 2**20) -> None:
        self.batches: deque[Any] = deque(kept, maxlen=batches)
        self.bytes = bytes
        self._sizes = deque(map(_size, self.batches), maxlen=batches)
        self._held: Any = None

    def hold(self, batch: Any) -> None:
        """Copies a batch that is about to be trained on, since the step may change it in place."""
        self._held = apply_to_collection(batch, Tensor, _host_copy)

    def keep(self) -> None:
        """Keeps the held batch, now that it was trained on: a resumed run trains again on one that was not."""
        if self._held is None:
            return
        self.batches.append(self._held)
        self._sizes.append(_size(self._held))
        self._held = None
        while len(self.batches) > 1 and sum(self._sizes) > self.bytes:
            self.batches.popleft()
            self._sizes.popleft()


def _host_copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)


def _size(batch: Any) -> int:
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.numel() * tensor.element_size()
        return tensor

    apply_to_collection(batch, torch.Tensor, count)
    return total
