"""Hooks around whole steps of an optimizer."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, final
from weakref import WeakMethod

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

Hook = Callable[[Optimizer, Any, Any], None]


def hook_whole_steps(optimizer: Optimizer, before: Hook | None, after: Hook) -> tuple[RemovableHandle, RemovableHandle]:
    """Calls ``before`` and ``after`` once per step, also where the ``step`` of a class calls that of its base class.

    torch calls hooks around both once it has made an optimizer of the base class too, anywhere in the process.

    Args:
        optimizer: Whose steps.
        before: Called with the optimizer and the arguments of its step.
        after: The same; not called if the step raised.

    Returns:
        Handles of the two hooks.
    """
    hooks = _WholeSteps(before, after)
    return optimizer.register_step_pre_hook(hooks.enter), optimizer.register_step_post_hook(hooks.leave)


def weakly(method: Hook) -> Hook:
    """Calls a method of an object for as long as that lives, without keeping it alive."""
    reference = WeakMethod(method)

    def call(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if (alive := reference()) is not None:
            alive(optimizer, args, kwargs)

    return call


def is_around(optimizer: Optimizer, other: Optimizer) -> bool:
    """Whether it is the same, or one that wraps the other and shares its parameter groups."""
    return optimizer is other or any(one is two for one in optimizer.param_groups for two in other.param_groups)


def was_skipped(optimizer: Optimizer) -> bool:
    """Whether the step whose hook this is called from has changed nothing.

    Fused optimizers are called even if the gradient scaler found an infinity, and skip the step themselves.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf)


@final
class _WholeSteps:
    def __init__(self, before: Hook | None, after: Hook) -> None:
        self._before = before
        self._after = after
        self._under_way: list[FrameType] = []  # what called the hooks of steps that have not ended

    def enter(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        caller = sys._getframe(1)
        if self._under_way:  # one inside of another, or one that has raised
            running = _callers(caller)
            self._under_way = [frame for frame in self._under_way if frame in running]
        self._under_way.append(caller)
        if self._before is not None and len(self._under_way) == 1:
            self._before(optimizer, args, kwargs)

    def leave(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._under_way:
            self._under_way.pop()
        if not self._under_way:
            self._after(optimizer, args, kwargs)


def _callers(frame: FrameType) -> set[FrameType]:
    found = set[FrameType]()
    while frame.f_back is not None:
        frame = frame.f_back
        found.add(frame)
    return found
