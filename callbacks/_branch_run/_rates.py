"""Learning rates and schedules while branches take turns."""

from collections.abc import Iterator
from copy import copy
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_merge.branches import Branches
from lightning_merge.branches._watched import Contents, Watched, are_the_same

_ABSENT = object()


@final
class Rates:
    """Learning rates and schedules, which every branch of a group finds as the first one did.

    So a schedule that the module steps itself moves once per group, and all branches train at the same rates.

    Args:
        branches: What the steps of their optimizers change is their own, and no rate.
        schedulers: The schedules.
    """

    _KEYS = ("lr", "momentum", "betas", "weight_decay")

    def __init__(self, branches: Branches, schedulers: list[Any]) -> None:
        self._branches = branches
        self._schedulers = list(_with_inner(schedulers))
        self._start: list[dict[str, Any]] = []
        self._after: list[dict[str, Any]] = []
        self._moved = False  # whether the turns so far have moved them
        self._found: list[dict[str, Any]] = []  # copies of what there was at the last look
        self._seen: list[dict[str, Any]] = []
        self._watched: Watched | None = None
        self._values: list[Any] = []
        self._contents = Contents(())
        self._reading = self._contents.read()

    def enter(self, *, first: bool, again: bool) -> None:
        """Puts rates where they were when the group began, unless they were changed since by no turn.

        Args:
            first: Whether the group begins.
            again: Whether nothing but the exchange of weights has happened since ``leave``.
        """
        if first or not again:
            now = self._taken()
            if first or not _same(now, self._after):
                self._start, self._moved = now, False
        if not self._moved:
            return
        for holder, start in zip(self._holders(), self._start, strict=True):
            for key, value in start.items():
                if isinstance(value, Tensor) and isinstance(holder.get(key), Tensor):
                    holder[key].copy_(value)
                elif holder.get(key, _ABSENT) is not value:
                    holder[key] = copy(value) if type(value) in (list, dict) else value

    def leave(self) -> None:
        """Remembers where the turn left them."""
        self._after = self._taken()
        if len(self._after) != len(self._start):
            self._start = self._after  # the turn has added a parameter group
        self._moved = not _same(self._after, self._start)

    def _holders(self) -> list[dict[str, Any]]:
        groups = [group for optimizer in self._branches.optimizers for group in optimizer.param_groups]
        return [*groups, *(vars(each) for each in self._schedulers)]

    def _taken(self) -> list[dict[str, Any]]:
        """What there is, copied if anything has changed since the last look."""
        holders, watched = self._holders(), self._watched
        values = watched.values() if watched is not None and are_the_same(self._seen, holders) else None
        is_known = values is not None and are_the_same(values, self._values)
        if is_known and self._contents.read().is_as(self._reading):
            return self._found  # as nearly always
        self._seen, self._watched = holders, Watched(holders, [self._others(each) for each in holders])
        self._values = self._watched.values() or []
        self._contents = Contents(self._values)
        self._reading = self._contents.read()
        self._found = self._copied()
        return self._found

    def _others(self, holder: dict[str, Any]) -> set[str]:
        """What is no rate of a group, and no state of a schedule."""
        is_group = "params" in holder
        return {k for k, v in holder.items() if isinstance(v, Optimizer) or (is_group and k not in self._KEYS)}

    def _copied(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for number, optimizer in enumerate(self._branches.optimizers):
            owned = self._branches.owned_settings(number)
            for place, group in enumerate(optimizer.param_groups):
                keys = [key for key in self._KEYS if key in group and (place, key) not in owned]
                found.append({key: _copy(group[key]) for key in keys})
        for each in self._schedulers:
            own = {key: value for key, value in vars(each).items() if not isinstance(value, Optimizer)}
            found.append({key: _copy(value) for key, value in own.items()})
        return found


def _with_inner(schedulers: list[Any]) -> Iterator[Any]:
    for each in schedulers:
        yield each
        for value in vars(each).values():
            inner = value if isinstance(value, list | tuple) else ()
            yield from _with_inner([part for part in inner if isinstance(part, LRScheduler | ReduceLROnPlateau)])


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return copy(value) if type(value) in (list, dict) else value


def _same(left: list[dict[str, Any]], right: list[dict[str, Any]]) -> bool:
    if left is right:
        return True
    if len(left) != len(right):
        return False
    for one, other in zip(left, right, strict=True):
        if one.keys() != other.keys() or not all(_alike(one[key], other[key]) for key in one):
            return False
    return True


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and bool(torch.equal(one, other))
    try:
        return one is other or bool(one == other)
    except Exception:  # what does not compare was not replaced
        return False
