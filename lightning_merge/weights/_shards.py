"""Shards: the part that this process holds of a tensor that is spread over several (``DTensor``).

FSDP2, tensor parallelism and both at once come down to that. Rules work element by element, so every process merges its
own parts and nothing is communicated; only a file that holds whole tensors takes the parts of the others.
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_with_path

from lightning_merge.weights._inventory import named_tensors
from lightning_merge.weights._names import Weights


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a ``DTensor``, of which this process may hold a part only."""
    # Not by its class: importing that takes a second, which most runs need not spend. And what is surely none first: to
    # find an attribute missing takes ten times as long.
    kind = type(tensor)
    return kind is not Tensor and kind is not nn.Parameter and hasattr(tensor, "to_local")


@torch.no_grad()
def local(weights: Mapping[str, Tensor]) -> Weights:
    """What is here of each tensor, sharing its memory; of one that is not sharded that is the tensor."""
    return {name: part_here(t) if is_sharded(t) else t for name, t in weights.items()}


def part_here(tensor: Any) -> Tensor:
    """What is here of a sharded tensor, sharing its memory."""
    part: Tensor = tensor.to_local()  # differentiable, and fast without gradients: callers turn them off, once for all
    return part


def reshard(module: Any, *, interrupted: bool = False) -> None:
    """Lets go of the whole parameters that FSDP2 keeps after a forward pass without a backward pass.

    While it keeps them, the module's parameters are not the sharded ones, and what is written to those is not used.
    After an interrupted forward pass it keeps those of modules that it does not reshard after each, as of the root.
    """
    for child in module.modules():
        kind: Any = type(child)
        if _is_fsdp(kind):
            if interrupted:
                child.set_reshard_after_forward(True, recurse=False)
            child.reshard()


@cache
def _is_fsdp(cls: type) -> bool:
    return "FSDPModule" in {base.__name__ for base in cls.__mro__}


def sharded_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The sharded parameters and buffers of a module, by canonical name.

    Raises:
        ValueError: If one is a sum that is still to be taken over processes.
    """
    reshard(module)
    found = {name: t for name, t in named_tensors(module).items() if is_sharded(t)}
    for name, tensor in found.items():
        placements: Any = tensor.placements  # type: ignore[attr-defined]
        if any(placement.is_partial() for placement in placements):
            raise ValueError(
                f"`{name}` is placed as {placements}: each process holds a summand of it, and averages of summands are"
                " not what you want. Place it as Shard or Replicate: `tensor.redistribute(placements=[Replicate()])`."
            )
    return found


def as_sharded(part: Tensor, like: Any) -> Tensor:
    """The sharded tensor of which this is the part that is here, laid out as another."""
    from torch.distributed.tensor import DTensor

    # Shape and stride from the other: with uneven parts they cannot be told from this one.
    return DTensor.from_local(part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride())


def part_of(whole: Tensor, like: Any) -> Tensor:
    """A copy of the part of a whole tensor that this process holds if it is laid out as another."""
    from torch.distributed.tensor import distribute_tensor

    placed = distribute_tensor(whole.detach(), like.device_mesh, like.placements, src_data_rank=None)
    return placed.to_local().detach().clone()


def map_named(function: Callable[[Any, Tensor], Any], nested: Any) -> Any:
    """Nested dicts and lists with ``function(name, tensor)`` for every tensor; the name is the key of its dict."""

    def convert(path: tuple[Any, ...], leaf: Any) -> Any:
        name = getattr(path[-1], "key", None) if path else None
        return function(name, leaf) if isinstance(leaf, Tensor) else leaf

    return tree_map_with_path(convert, nested)
