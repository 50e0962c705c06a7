"""Several means that take in the same weights, which are read once for all of them."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_merge.weights._names import Weights
from lightning_merge.weights._pairs import pairs, runs

_AT_A_TIME = {"cpu": 2**19, "cuda": 2**22}
"""Numbers that stay in a cache until all means have read them: 2 MB in float32, and 16 MB."""


class _Step(NamedTuple):
    """``target <- target + weight * (source - target)``, to be done."""

    target: Weights
    source: Mapping[str, Tensor]
    weight: float
    anew: bool


_steps: ContextVar[list[_Step] | None] = ContextVar("_steps", default=None)
_joins: ContextVar[bool] = ContextVar("_joins", default=False)
_ALONE = nullcontext()


@contextmanager
def in_one_pass() -> Iterator[None]:
    """Inside, what ``joining`` means take in waits until the end of the block, and is done for all at once."""
    token = _steps.set([])
    try:
        yield
    finally:
        steps = _steps.get() or []
        _steps.reset(token)
        _do(steps)


def joining() -> AbstractContextManager[None]:
    """Inside, ``lerp_`` waits for the end of the pass that is open, if one is, to be done for all at once.

    It is for who does not read before that what ``lerp_`` has written.
    """
    return _ALONE if _steps.get() is None else _joining()


@contextmanager
def _joining() -> Iterator[None]:
    token = _joins.set(True)
    try:
        yield
    finally:
        _joins.reset(token)


def waits(target: Weights, source: Mapping[str, Tensor], weight: float, anew: bool) -> bool:
    """Whether a step will be done later: takes note of it where there is a pass to join."""
    steps = _steps.get()
    if steps is None or not _joins.get():
        return False
    steps.append(_Step(target, source, weight, anew))
    return True


def step(target: Weights, source: Mapping[str, Tensor], weight: float, anew: bool) -> None:
    """``target <- target + weight * (source - target)``; with new tensors in ``target`` where that is asked for."""
    for names, targets, sources in pairs(target, source):
        if anew:
            target |= zip(names, torch._foreach_lerp(targets, sources, weight), strict=True)
        else:
            torch._foreach_lerp_(targets, sources, weight)


@torch.no_grad()
def _do(steps: list[_Step]) -> None:
    while steps:
        first, others = steps[0], steps[1:]
        alike = [other for other in others if _is_like(other, first)]
        _do_together([first, *alike])
        steps = [other for other in others if not any(other is each for each in alike)]


def _is_like(one: _Step, other: _Step) -> bool:
    """Whether two steps take in the same tensors, in the same precision, into means laid out alike in one place."""
    return list(one.target) == list(other.target) and all(
        one.source[name] is other.source[name]
        and value.dtype == mean.dtype
        and value.device == mean.device
        and value.stride() == mean.stride()
        for (name, value), mean in zip(one.target.items(), other.target.values(), strict=True)
    )


def _do_together(steps: list[_Step]) -> None:
    first = steps[0]
    size = _AT_A_TIME.get(next((t.device.type for t in first.target.values()), ""))
    if len(steps) == 1 or size is None:
        for each in steps:
            step(*each)
        return
    # What has to be converted is so once for all.
    for names, targets, sources in pairs(first.target, first.source):
        for start, end in runs(targets, size):
            if end - start == 1 and targets[start].numel() > size and _can_be_cut(first, targets[start]):
                _do_in_pieces(steps, names[start], sources[start], size)
            else:
                _do_at_once(steps, names[start:end], sources[start:end])


def _can_be_cut(first: _Step, target: Tensor) -> bool:
    return target.is_cpu and target.is_contiguous() and not first.anew


def _do_in_pieces(steps: list[_Step], name: str, source: Tensor, size: int) -> None:
    """All means of one large tensor, a piece after the other."""
    cut = [each.target[name].view(-1).unsafe_split(size) for each in steps]
    for piece, *targets in zip(source.reshape(-1).unsafe_split(size), *cut, strict=True):
        for each, target in zip(steps, targets, strict=True):
            target.lerp_(piece, each.weight)


def _do_at_once(steps: list[_Step], names: list[str], sources: list[Tensor]) -> None:
    for each in steps:
        targets = [each.target[name] for name in names]
        if each.anew:
            each.target.update(zip(names, torch._foreach_lerp(targets, sources, each.weight), strict=True))
        else:
            torch._foreach_lerp_(targets, sources, each.weight)
