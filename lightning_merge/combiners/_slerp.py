"""Spherical interpolation."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge._checks import instance, number, settle
from lightning_merge._mergeable import why_not
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.combiners._kept import as_in
from lightning_merge.combiners._scale import Scale, checked_scale, scaled_result
from lightning_merge.weights import (
    State,
    Weights,
    average_dtype,
    copy_,
    is_averaged,
    joined,
    rows,
    unstacked,
    worth_it,
    zeros,
)

_STRAIGHT = 0.9995


@final
@dataclass(frozen=True)
class SLERP(Combiner):
    """Per tensor along the great circle: ``merged <- sin((1 - t) a) / sin(a) * merged + sin(t a) / sin(a) * v``.

    ``a`` is the angle between the two; the first vector is taken as it is, and the order of the tasks matters. Where
    there is no great circle (one is zero, or ``|cos a| > 0.9995``) it is a straight line.

    Args:
        t: Share of the newest task, in ``[0, 1]``.
        scale: Multiplies the result; in ``(0, 10]``, or shrinking with the number of tasks (``Sum``). Below 1 it is
            WARP's step back to the base.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> SLERP().combine([{"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}])
        {'w': tensor([0.7071, 1.4142])}

    References:
        Ramé et al., "WARP: on the benefits of weight averaged rewarded policies", 2024, section 3.2.
    """

    t: float = 0.5
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        settle(self, t=number("t", self.t, "[0, 1]"))
        settle(self, scale=checked_scale(self.scale))

    @property
    def locality(self) -> Locality:
        return "tensor"

    def init(self, like: Weights) -> State:
        return {"merged": zeros(like), "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        merged = state["merged"]
        if not state["updates"]:
            copy_(merged, vector)
            return
        new = as_in(merged, vector)
        for names, matrix in rows(merged):
            between = _between(matrix, joined(new, names), self.t)
            copy_({name: merged[name] for name in names}, unstacked(between, names, merged))

    def _merged(self, state: State) -> Weights | None:
        return scaled_result(state, "merged", self.scale)


def slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Interpolates along the great circle from ``a`` at ``t=0`` to ``b`` at ``t=1``; magnitudes are kept, not the norm.

    Args:
        a: Where ``t=0`` is; any shape, taken as one vector.
        b: Where ``t=1`` is; the same shape.
        t: Position on the way; outside [0, 1] it goes on along the circle.

    Example:
        >>> slerp(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0]), 0.25)
        tensor([0.9239, 0.7654, 0.0000])

    Raises:
        TypeError: If ``a`` or ``b`` is no tensor, or ``t`` no number.
        ValueError: If their shapes differ, they do not hold real numbers, or ``t`` is not finite.
    """
    for argument, value in (("a", a), ("b", b)):
        instance(argument, value, Tensor, "a tensor")
        if not is_averaged(value) or value.is_complex():
            raise ValueError(f"`{argument}` {why_not(value) or f'must hold real numbers, got {value.dtype}'}.")
    if a.shape != b.shape:
        raise ValueError(f"`b` must have the shape of `a`, {tuple(a.shape)}, got {tuple(b.shape)}.")
    t = number("t", t)
    return _between(a.reshape(1, a.numel()), b.reshape(1, a.numel()), t).view(a.shape)


def _between(a: Tensor, b: Tensor, t: float) -> Tensor:
    """``slerp`` of each row."""
    if not a.shape[1]:
        return a + b
    cosine = _cosines(a, b)
    straight = cosine.abs() > _STRAIGHT
    found = a
    if worth_it(~straight):
        # MPS has no float64.
        angle = cosine.to(torch.float32 if a.device.type == "mps" else torch.float64).arccos()
        first, second = ((angle * share).sin() / angle.sin() for share in (1 - t, t))
        found = a * first.to(a.dtype) + b * second.to(b.dtype)
    if worth_it(straight):
        line = torch.lerp(a, b, t)
        overflows = ~line.isfinite().all(1, keepdim=True)
        if worth_it(overflows):
            line = torch.where(overflows, a * (1.0 - t) + b * t, line)
        found = torch.where(straight, line, found)
    return found


def _cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of the angles between the rows, as a column; 1 if one of two is zero."""
    lengths = [x.norm(dim=1, keepdim=True) for x in (a, b)]
    cosine = (a * b).sum(1, keepdim=True) / (lengths[0] * lengths[1])
    extreme = torch.stack([(length <= 1e-15) | (length >= 1e15) for length in lengths]).any(0)
    if worth_it(extreme):
        # Brought to a largest magnitude of 1: squares of what is large or small leave their type.
        a, b = (x.to(average_dtype(x)) / x.abs().amax(1, keepdim=True).to(average_dtype(x)) for x in (a, b))
        tamed = (a * b).sum(1, keepdim=True) / (a.norm(dim=1, keepdim=True) * b.norm(dim=1, keepdim=True))
        cosine = torch.where(extreme, tamed, cosine)
    return torch.where(cosine.isnan(), 1.0, cosine)
