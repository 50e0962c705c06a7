"""How far apart two sets are, without waiting for a device."""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_merge.weights._chunks import slices
from lightning_merge.weights._shards import is_sharded

_ON_HOST, _ON_DEVICE = 1 << 17, 1 << 24
"""Numbers that are compared at once: there what stays in a cache, here enough for few launches."""


@torch.no_grad()
def squared_distance(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], placed: Mapping[str, Tensor] | None = None
) -> Tensor:
    """Sum of ``|left - right| ** 2`` over the tensors of ``left``: a number on the device of one of them.

    It takes one pass over both sets, and beside them the room of a piece of one. With none it is 0.

    Args:
        left: Averages, by name; at least in float32.
        right: Tensors of the same names, shapes and devices.
        placed: The same tensors as the module has them, if some are sharded. Of what several processes hold alike each
            then counts its share, so that the sum over all processes is that of whole tensors.
    """
    waiting: dict[tuple[torch.dtype, torch.device, float], _Group] = {}
    sums: list[Tensor] = []
    for name, tensor in left.items():
        one, other = _flat(tensor), _flat(right[name].detach())
        key = one.dtype, one.device, 1.0 / _holders(placed[name]) if placed else 1.0
        most = _ON_HOST if _is_host(one) else _ON_DEVICE
        for piece in slices(one.numel(), most):
            group = waiting.setdefault(key, _Group([], []))
            group.left.append(one[piece])
            group.right.append(other[piece].to(one.dtype))
            if sum(map(Tensor.numel, group.left)) >= most:
                sums.append(waiting.pop(key).squares() * key[2])
    sums += [group.squares() * share for (_, _, share), group in waiting.items()]
    return torch.stack([each.to(sums[0].device) for each in sums]).sum() if sums else torch.zeros(())


class _Group(NamedTuple):
    """Flat tensors of one kind that are compared at once."""

    left: list[Tensor]
    right: list[Tensor]

    def squares(self) -> Tensor:
        """In the widest precision: what a piece cannot resolve in its own, a sum of thousands should not lose too."""
        if _is_host(self.left[0]):
            difference = _joined(self.left) - _joined(self.right)  # small enough to stay in the cache
            return torch.dot(difference, difference).double()
        norms = torch._foreach_norm(torch._foreach_sub(self.left, self.right))
        return torch.stack(norms).to(torch.float32 if norms[0].device.type == "mps" else torch.float64).square().sum()


def _is_host(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def _joined(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def _flat(tensor: Tensor) -> Tensor:
    return (torch.view_as_real(tensor) if tensor.is_complex() else tensor).reshape(-1)


def _holders(tensor: Tensor) -> int:
    """How many processes hold the same part of a tensor."""
    everyone = dist.get_world_size() if dist.is_initialized() else 1
    if not is_sharded(tensor):
        return everyone
    placements, mesh = tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]
    parts = math.prod(int(mesh.size(i)) for i, placement in enumerate(placements) if not placement.is_replicate())
    return everyone // parts
