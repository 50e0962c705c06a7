"""Which part of a parameter this process holds."""

from dataclasses import dataclass
from typing import final

import torch.distributed as dist
from torch import Tensor

from lightning_merge.weights._shards import is_sharded, part_here

_REFUSED = (
    "online merging knows DTensors that are replicated or sharded in dimension 0, as `fully_shard` (FSDP2) makes them."
)


@final
@dataclass(frozen=True)
class Part:
    """Elements ``start`` to ``stop`` of a tensor of ``numel`` elements, in the order of its shape."""

    numel: int
    start: int
    stop: int
    group: dist.ProcessGroup | None = None
    """The processes that hold the other parts; ``None`` if there are none."""

    def total_(self, values: Tensor) -> Tensor:
        """Sums ``values`` over the processes that hold the other parts, in place."""
        if self.group is not None:
            dist.all_reduce(values, group=self.group)
        return values


def held_of(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor; it shares memory."""
    return (part_here(tensor) if is_sharded(tensor) else tensor).detach()


def part_held(name: str, tensor: Tensor) -> Part:
    """Where what this process holds lies in the whole tensor.

    Raises:
        ValueError: If the tensor is sharded in another way than along its first dimension.
    """
    if hasattr(tensor, "_handle") or type(tensor).__name__ == "FlatParameter":
        raise ValueError(f"`{name}` is a flat parameter of FSDP1; {_REFUSED}")
    if not is_sharded(tensor):
        return Part(tensor.numel(), 0, tensor.numel())
    placements, mesh = tensor.placements, tensor.device_mesh  # type: ignore[attr-defined]
    sharded = [i for i, placement in enumerate(placements) if not placement.is_replicate()]
    # By name: a strided shard says that it is a shard too.
    if not sharded:
        return Part(tensor.numel(), 0, tensor.numel())
    if len(sharded) > 1 or type(placements[sharded[0]]).__name__ != "Shard" or placements[sharded[0]].dim != 0:
        raise ValueError(f"`{name}` has placements {placements}; {_REFUSED}")
    rows, row = tensor.shape[0], tensor.numel() // max(tensor.shape[0], 1)
    group = mesh.get_group(sharded[0])
    each = -(-rows // dist.get_world_size(group))
    first = min(mesh.get_local_rank(sharded[0]) * each, rows)
    rows_held = held_of(tensor).shape[0]
    if rows_held != min(each, rows - first):
        raise ValueError(f"`{name}` is sharded unevenly in a way that its mesh does not say; {_REFUSED}")
    return Part(tensor.numel(), first * row, (first + rows_held) * row, group)
