"""Copies in host memory for which the host does not wait."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.weights._memory import is_dense
from lightning_merge.weights._pairs import runs

_TOGETHER = 2**24
"""Numbers that make the way together: 64 MB in float32, for which a launch and its memory are little."""


class ToHost:
    """Copies tensors into host memory: those of a CUDA device into pinned memory, beside what the device computes.

    What the copies hold may be read after ``wait``.
    """

    def __init__(self) -> None:
        self._under_way: dict[torch.device, Any] = {}

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of a tensor as it is now, whatever is written to it afterwards."""
        tensor = tensor.detach()
        # The step may write to its batch. A clone on the device takes a hundredth of the time of the way to the host.
        return self._sent(tensor.clone()) if _is_on_a_device(tensor) else tensor.to(torch.device("cpu"), copy=True)

    def copies(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of many tensors, laid out as they are: in a few launches, whatever their number."""
        found: dict[str, Tensor] = {}
        groups: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            if _is_on_a_device(tensor) and is_dense(tensor):
                groups.setdefault((tensor.dtype, tensor.device), {})[name] = tensor.detach()
            else:
                found[name] = self.copy(tensor)
        for group in groups.values():
            names, members = list(group), list(group.values())
            for start, end in runs(members, _TOGETHER):
                found |= zip(names[start:end], self._together(members[start:end]), strict=True)
        return {name: found[name] for name in tensors}

    def _together(self, tensors: list[Tensor]) -> list[Tensor]:
        copied = self._sent(torch.cat([tensor.as_strided((tensor.numel(),), (1,)) for tensor in tensors]))
        pieces = copied.split_with_sizes([tensor.numel() for tensor in tensors])
        return [
            piece.as_strided(tensor.shape, tensor.stride(), piece.storage_offset())
            for piece, tensor in zip(pieces, tensors, strict=True)
        ]

    def _sent(self, source: Tensor) -> Tensor:
        """What nobody else writes to, on its way."""
        beside = _stream(source.device)
        beside.wait_stream(torch.cuda.current_stream(source.device))
        with torch.cuda.stream(beside):
            copied = source.to("cpu", non_blocking=True)
        source.record_stream(beside)
        self._under_way[source.device] = beside
        return copied

    def sent(self) -> None:
        """Called after the last copy."""
        self._under_way = {device: stream.record_event() for device, stream in self._under_way.items()}

    def wait(self) -> None:
        """Returns when all copies have arrived."""
        for arrived in self._under_way.values():
            arrived.synchronize()
        self._under_way = {}


def _is_on_a_device(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return plain and tensor.device.type == "cuda"


@cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
