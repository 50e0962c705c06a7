"""Arithmetic on all tensors of a set at once, in place, so that the rules read like their formulas."""

from collections.abc import Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_merge.weights._names import Weights


@torch.no_grad()
def lerp_(target: Weights, source: Mapping[str, Tensor], weight: float) -> None:
    """``target <- target + weight * (source - target)``, in place and in the target's precision; at 1 a copy."""
    if weight == 1:
        copy_(target, source)  # nothing of the target remains, not even a NaN
        return
    for targets, sources in _pairs(target, source):
        torch._foreach_lerp_(targets, sources, weight)


@torch.no_grad()
def copy_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """``target <- source``, in place; dtypes and devices may differ."""
    if target:  # torch refuses empty lists
        torch._foreach_copy_(list(target.values()), [source[name] for name in target])


@torch.no_grad()
def zero_(weights: Weights) -> None:
    """Sets every number to zero, in place."""
    if weights:
        torch._foreach_zero_(list(weights.values()))


@torch.no_grad()
def add_(target: Weights, source: Mapping[str, Tensor], factor: float = 1.0) -> None:
    """``target <- target + factor * source``, in place and in the target's precision."""
    alpha = 1 if factor == 1 else factor  # integers take no other
    for targets, sources in _pairs(target, source):
        torch._foreach_add_(targets, sources, alpha=alpha)


@torch.no_grad()
def scale_(weights: Weights, factor: float) -> None:
    """``weights <- factor * weights``, in place."""
    if factor != 1 and weights:
        torch._foreach_mul_(list(weights.values()), factor)


@torch.no_grad()
def scaled(weights: Weights, factor: float) -> Weights:
    """``factor * weights``; at 1 the weights themselves."""
    if factor == 1 or not weights:
        return weights
    return dict(zip(weights, torch._foreach_mul(list(weights.values()), factor), strict=True))


@torch.no_grad()
def compensated_lerp_(target: Weights, compensation: Weights, source: Mapping[str, Tensor], weight: float) -> None:
    """``lerp_`` that keeps in ``compensation`` what rounding loses, so steps below the resolution add up (Kahan)."""
    for name, value in target.items():
        carried = compensation[name]
        if weight == 1:
            value.copy_(source[name])
            carried.zero_()
            continue
        step = source[name].to(value).sub(value).sub_(carried).mul_(weight).add_(carried)
        before = value.clone()
        value.add_(step)
        carried.copy_(step.sub_(before.neg_().add_(value)))


def mean_over_ranks_(weights: Weights) -> None:
    """Replaces floating-point tensors by their mean over all ranks; one all-reduce, none on a single process."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    # In one order everywhere: that of a set of names differs between processes.
    floats = [weights[name] for name in sorted(weights) if weights[name].is_floating_point()]
    if not floats:
        return
    flat = torch.cat([t.reshape(-1).float() for t in floats])
    dist.all_reduce(flat)
    parts = torch.split(flat.div_(dist.get_world_size()), [t.numel() for t in floats])
    torch._foreach_copy_(floats, [part.view_as(t) for part, t in zip(parts, floats, strict=True)])


def _pairs(target: Weights, source: Mapping[str, Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Tensors of one dtype and device in one group; those that need a conversion one by one, to hold one at a time."""
    groups: dict[tuple[torch.dtype, torch.device], tuple[list[Tensor], list[Tensor]]] = {}
    for name, value in target.items():
        other = source[name]
        if other.dtype != value.dtype or other.device != value.device:
            yield [value], [other.to(value)]
        else:
            targets, sources = groups.setdefault((value.dtype, value.device), ([], []))
            targets.append(value)
            sources.append(other)
    yield from groups.values()
