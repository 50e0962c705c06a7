"""Arithmetic on all tensors of a set at once, in place, so that the rules read like their formulas."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from lightning_merge.weights._names import Weights
from lightning_merge.weights._one_pass import step, waits
from lightning_merge.weights._pairs import in_order, pairs

_anew: ContextVar[bool] = ContextVar("_anew", default=False)


@contextmanager
def made_anew() -> Iterator[None]:
    """Inside, ``lerp_``, ``compensated_lerp_`` and ``copy_`` put new tensors into ``target``, with the same numbers.

    So whoever has kept the tensors that were there can go back to them.
    """
    token = _anew.set(True)
    try:
        yield
    finally:
        _anew.reset(token)


@torch.no_grad()
def lerp_(target: Weights, source: Mapping[str, Tensor], weight: float) -> None:
    """``target <- target + weight * (source - target)``, in place and in the target's precision; at 1 a copy."""
    if weight == 1:
        copy_(target, source)  # nothing of the target remains, not even a NaN
        return
    if not waits(target, source, weight, _anew.get()):
        step(target, source, weight, _anew.get())


@torch.no_grad()
def copy_(target: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """``target <- source``, in place; dtypes and devices may differ."""
    if _anew.get() and isinstance(target, dict):
        target |= {name: torch.empty_like(tensor) for name, tensor in target.items()}
    if target:  # torch refuses empty lists
        torch._foreach_copy_(list(target.values()), in_order(list(target), source))


@torch.no_grad()
def zero_(weights: Weights) -> None:
    """Sets every number to zero, in place."""
    if weights:
        torch._foreach_zero_(list(weights.values()))


@torch.no_grad()
def add_(target: Weights, source: Mapping[str, Tensor], factor: float = 1.0) -> None:
    """``target <- target + factor * source``, in place and in the target's precision."""
    alpha = 1 if factor == 1 else factor  # integers take no other
    for _, targets, sources in pairs(target, source):
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
    if _anew.get():
        for kept in (target, compensation):
            kept |= {name: tensor.clone() for name, tensor in kept.items()}
    for name, value in target.items():
        carried = compensation[name]
        if weight == 1:
            value.copy_(source[name])
            carried.zero_()
            continue
        move = source[name].to(value).sub(value).sub_(carried).mul_(weight).add_(carried)
        before = value.clone()
        value.add_(move)
        carried.copy_(move.sub_(before.neg_().add_(value)))
