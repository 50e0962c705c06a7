"""Tensors spread over processes, each of which holds some of them whole."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_merge.weights import Weights


def world() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if world() > 1 else 0


def owners_of(like: Mapping[str, Tensor]) -> dict[str, int]:
    """Which process holds which tensor: about equal shares."""
    loads = [0] * world()
    owners = {}
    for name in sorted(like, key=lambda name: -like[name].numel()):
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += like[name].numel()
    return owners


def send_to_all(weights: Mapping[str, Tensor], owners: Mapping[str, int]) -> None:
    """Sends each process's weights to all others; ``owners`` in one order everywhere."""
    if world() == 1:
        return
    for rank in range(world()):
        tensors = [weights[name].detach() for name, owner in owners.items() if owner == rank]
        if tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            dist.broadcast(flat, rank)
            for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view(tensor.shape))


def gathered(own: Weights) -> Weights:
    """The tensors of all processes, on each of them."""
    if world() == 1:
        return dict(own)
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, {name: tensor.cpu() for name, tensor in own.items()})
    return {name: tensor for part in found for name, tensor in part.items()}


def sum_over_ranks_(tensor: Tensor) -> None:
    """Replaces small numbers by their sums over all processes."""
    if world() > 1:
        device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else tensor.device
        there = tensor.to(device)
        dist.all_reduce(there)
        tensor.copy_(there)
