"""How large the numbers of a set are."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from lightning_merge.weights._precision import average_dtype


@torch.no_grad()
def all_below(weights: Mapping[str, Tensor], limit: float) -> bool:
    """Whether a cheap bound proves all magnitudes of real numbers to be below a limit of at least 1."""
    tensors = [t for t in weights.values() if t.numel()]
    return all(bool((torch.stack(norms) < limit).all()) for norms in norms_of(tensors))  # or squares, which are larger


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


def norms_of(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """A norm of each tensor, in lists of one dtype and device."""
    groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        groups.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for group in groups.values():
        # On a CPU BLAS reads a large tensor faster than torch does, on both cores; small ones are all dispatch.
        large = [t for t in group if _is_for_blas(t)]
        small = [t for t in group if not _is_for_blas(t)]
        norms = [torch.dot(flat, flat) for flat in (t.view(-1) for t in large)]
        if small:
            norms += torch._foreach_norm(small, dtype=average_dtype(small[0]))
        yield norms


def _is_for_blas(tensor: Tensor) -> bool:
    plain = tensor.dtype in (torch.float32, torch.float64) and tensor.is_contiguous()
    return plain and tensor.device.type == "cpu" and tensor.numel() >= 1 << 16
