"""What all processes hold alike: means and copies over ranks."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_merge.weights._copies import copies
from lightning_merge.weights._names import Weights
from lightning_merge.weights._precision import is_averaged
from lightning_merge.weights._shards import as_sharded, is_sharded, part_of


@torch.no_grad()
def mean_over_ranks_(weights: Weights, like: Mapping[str, Tensor] | None = None) -> None:
    """Replaces tensors by their mean over all ranks, and what has no mean (integers, flags) by that of the first one.

    What is equal everywhere stays as it is, to the last digit. One all-reduce, and a broadcast for what has no mean;
    none on a single process. Every process must call this.

    Args:
        weights: What is here of each tensor.
        like: Those of them that are spread over processes, as they are: of these the whole tensors are averaged, so
            that no part meets another one.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    # In one order everywhere: that of a set of names differs between processes.
    whole = {name: _whole(weights[name], (like or {}).get(name)) for name in sorted(weights)}
    parts = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in whole.items() if is_averaged(t)}
    if parts:
        _mean_(list(parts.values()))
    if others := [t for t in whole.values() if not is_averaged(t) and type(t.data) is Tensor]:
        _of_first_(others)
    for name, tensor in whole.items():
        if tensor is not weights[name]:
            weights[name].copy_(part_of(tensor, (like or {})[name]))


@torch.no_grad()
def of_first_rank(weights: Mapping[str, Tensor]) -> Weights:
    """Copies of the first process's tensors, in every process. All must call this."""
    found = copies({name: weights[name] for name in sorted(weights)})
    if found and dist.is_available() and dist.is_initialized():
        _of_first_(list(found.values()))
    return found


@torch.no_grad()
def apart(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the same bits in all processes, by their sums. All must call this."""
    names = sorted(name for name, t in weights.items() if t.numel() and type(t.data) is Tensor)
    if not names or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return []
    device = weights[names[0]].device
    sums = torch.stack([_sum_of_bits(weights[name]).to(device) for name in names])
    ends = torch.cat([sums, ~sums])
    dist.all_reduce(ends, dist.ReduceOp.MAX)
    largest, smallest = ends.chunk(2)
    return [name for name, equal in zip(names, (largest == ~smallest).tolist(), strict=True) if not equal]


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """A sum modulo 2^64 of what is in memory, 8 bytes at a time: the same whatever the order, and quick."""
    flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    most = flat.numel() // 8 * 8
    return flat[:most].view(torch.int64).sum() + flat[most:].sum()


def _whole(part: Tensor, like: Tensor | None) -> Tensor:
    if like is None or not is_sharded(like):
        return part
    whole: Tensor = as_sharded(part, like).full_tensor()  # type: ignore[attr-defined]
    return whole.clone()


def _mean_(tensors: list[Tensor]) -> None:
    count = dist.get_world_size()
    # Of float64 a sum of equal numbers in float32, or narrower, is exact, and holds the largest of them.
    flat = torch.cat([t.reshape(-1).double() for t in tensors]).div_(count)
    dist.all_reduce(flat)
    if wide := [t for t in tensors if t.dtype == torch.float64]:
        ends = torch.cat([t.reshape(-1) for t in wide])
        ends = torch.cat([ends, -ends])
        dist.all_reduce(ends, dist.ReduceOp.MAX)
        largest, smallest = ends.chunk(2)
        equal = iter(torch.split(largest == smallest.neg_(), [t.numel() for t in wide]))
    for tensor, mean in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        mean = mean.view_as(tensor)
        tensor.copy_(torch.where(next(equal).view_as(tensor), tensor, mean) if tensor.dtype == torch.float64 else mean)


def _of_first_(tensors: list[Tensor]) -> None:
    """By their bytes, whatever they mean."""
    flat = torch.cat([t.contiguous().reshape(-1).view(torch.uint8) for t in tensors])
    dist.broadcast(flat, src=0)
    for tensor, held in zip(tensors, torch.split(flat, [t.numel() * t.element_size() for t in tensors]), strict=True):
        # In memory of its own: another dtype wants it at a multiple of its size.
        tensor.copy_(held.clone().view(tensor.dtype).view(tensor.shape))
