"""How large the numbers of a set are."""

from collections.abc import Iterable, Iterator, Mapping
from math import hypot, isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_merge.weights._precision import average_dtype


@torch.no_grad()
def all_below(weights: Mapping[str, Tensor], limit: float) -> bool:
    """Whether a cheap bound proves all magnitudes of real numbers to be below a limit of at least 1."""
    tensors = [t for t in weights.values() if t.numel()]
    return all(bool((norms < limit).all()) for norms in norms_of(tensors))  # or squares, which are larger


@torch.no_grad()
def largest(weights: Mapping[str, Tensor]) -> dict[str, float]:
    """The largest magnitude of each tensor of real numbers; 0 of an empty one."""
    groups: dict[tuple[torch.dtype, torch.device], list[str]] = {}
    found = dict.fromkeys(weights, 0.0)
    for name, tensor in weights.items():
        if tensor.numel():
            groups.setdefault((tensor.dtype, tensor.device), []).append(name)
    for names in groups.values():  # one synchronisation per dtype and device
        norms = torch._foreach_norm([weights[name] for name in names], float("inf"))
        found |= zip(names, torch.stack(norms).tolist(), strict=True)
    return found


@torch.no_grad()
def norm(weights: Mapping[str, Tensor]) -> float:
    """The Euclidean norm over all tensors of real numbers, in float64; the same whatever the order of the names."""
    devices: dict[torch.device, list[str]] = {}
    found: dict[str, float] = {}
    for name, tensor in weights.items():
        if tensor.numel():
            devices.setdefault(tensor.device, []).append(name)
    for names in devices.values():  # one synchronisation per device
        norms = torch._foreach_norm([weights[name] for name in names], dtype=torch.float64)
        found |= zip(names, torch.stack(norms).tolist(), strict=True)
    return hypot(*(found[name] for name in sorted(found)))


def norms_of(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Norms, or squares of them, of tensors or of several together: in one tensor for each dtype and device."""
    return Norms(tensors).taken()


class Norms:
    """How norms of tensors are taken fastest; what they hold may change from one time to the next."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._groups: dict[tuple[torch.dtype, torch.device], _Group] = {}
        for tensor in tensors:
            group = self._groups.setdefault((tensor.dtype, tensor.device), _Group([], [], [], []))
            for_blas = tensor.dtype in (torch.float32, torch.float64) and tensor.device.type == "cpu"
            kind = group.others if not for_blas else group.small if tensor.numel() < _SMALL else group.large
            if kind is group.small and tensor.dim() == 1:
                kind = group.vectors
            kind.append(tensor)

    def are_finite(self) -> bool:
        """Whether all norms are finite, and with them all numbers; a norm may overflow all the same."""
        return all(map(_are_finite, self.taken()))

    def taken(self) -> Iterator[Tensor]:
        """One tensor of norms, or of their squares, for each dtype and device."""
        for large, small, vectors, others in self._groups.values():
            # On a CPU BLAS reads a large tensor faster than torch does, on both cores; small ones are all dispatch.
            norms = [torch.dot(flat, flat) for flat in [tensor.reshape(-1) for tensor in large]]
            if small or vectors:  # most are vectors, which are joined at once
                joined = torch.cat([*vectors, *[tensor.reshape(-1) for tensor in small]])
                norms.append(torch.dot(joined, joined))
            if others:
                norms += torch._foreach_norm(others, dtype=average_dtype(others[0]))
            yield torch.stack(norms)


def _are_finite(norms: Tensor) -> bool:
    # What is in host memory is read there: nothing has to be waited for, and that takes less than an operation.
    return all(map(isfinite, norms.tolist())) if norms.is_cpu else bool(norms.isfinite().all())


class _Group(NamedTuple):
    large: list[Tensor]
    small: list[Tensor]
    vectors: list[Tensor]
    others: list[Tensor]


_SMALL = 1 << 14
"""Numbers below which the call of an operation takes longer than what it does."""
