"""Copies in host memory for which the host does not wait."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class ToHost:
    """Copies tensors into host memory: those of a CUDA device into pinned memory, beside what the device computes.

    What the copies hold may be read after ``wait``.
    """

    def __init__(self) -> None:
        self._under_way: dict[torch.device, Any] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor as it is now, whatever is written to it afterwards."""
        tensor = tensor.detach()
        plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if not plain or tensor.device.type != "cuda":
            return tensor.to(torch.device("cpu"), copy=True)
        beside = _stream(tensor.device)
        # The step may write to its batch. A clone on the device takes a hundredth of the time of the way to the host.
        source = tensor.clone()
        beside.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(beside):
            copied = source.to("cpu", non_blocking=True)
        source.record_stream(beside)
        self._under_way[tensor.device] = beside
        return copied

    def sent(self) -> None:
        """Called after the last copy."""
        self._under_way = {device: stream.record_event() for device, stream in self._under_way.items()}

    def wait(self) -> None:
        """Returns when all copies have arrived."""
        for arrived in self._under_way.values():
            arrived.synchronize()
        self._under_way = {}


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
