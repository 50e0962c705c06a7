"""What of a module and of a loop belongs to a branch while it has its turn, beside weights and optimizer state."""

from collections.abc import Iterator
from copy import copy
from operator import is_
from typing import Any, TypeAlias, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lightning_merge.branches import Branches
from lightning_merge.weights import is_metric

_ABSENT = object()
_NO_ATTRIBUTES = frozenset(vars(nn.Module())) | frozenset(vars(LightningModule()))
Place: TypeAlias = tuple[int, str]
"""Which submodule and which attribute."""


@final
class OwnAttributes:
    """Plain attributes that a training step assigns on the module, as a hidden state: each branch has its own.

    Shared are what a step writes into (lists, dicts, metrics), and plain numbers, which count the steps of all. What is
    assigned between the turns is for all.

    Args:
        branches: The branches; their inventory knows when submodules come and go.
    """

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._version = -1
        self._holders: list[dict[str, Any]] = []
        self._before: list[dict[str, Any]] = []
        self._start: dict[Place, Any] = {}  # as it was before the first turn that assigned it
        self._left: dict[Place, Any] = {}  # as the last turn left it
        self._kept: dict[int, dict[Place, Any]] = {}

    def enter(self, branch: int) -> None:
        """Puts those of a branch in place."""
        self._find()
        own = self._kept.get(branch, {})
        for place, left in self._left.items():
            holder, key = self._holders[place[0]], place[1]
            now = holder.get(key, _ABSENT)
            if now is not left:
                self._start[place] = now
                for kept in self._kept.values():
                    kept.pop(place, None)
            _assign(holder, key, own.get(place, self._start[place]))
        self._before = [dict(holder) for holder in self._holders]

    def leave(self, branch: int) -> None:
        """Keeps what the turn has assigned."""
        for number, (before, holder) in enumerate(zip(self._before, self._holders, strict=True)):
            for key in _changed(before, holder):
                if (number, key) not in self._start and not _is_shared(holder.get(key)):
                    self._start[number, key] = before.get(key, _ABSENT)
        self._left = {(number, key): self._holders[number].get(key, _ABSENT) for number, key in self._start}
        self._kept[branch] = dict(self._left)

    def _find(self) -> None:
        if self._version != self._branches.inventory.version:
            self._version = self._branches.inventory.version
            holders = [
                vars(each)
                for each in self._branches.module.modules()
                if not is_metric(each) and not isinstance(each, torch.jit.ScriptModule)
            ]
            if [id(each) for each in holders] != [id(each) for each in self._holders]:
                self._holders = holders
                self._start, self._left, self._kept = {}, {}, {}


def _is_shared(value: Any) -> bool:
    """A number, or what is computed anew in every forward pass, as the weight of a parametrisation."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.grad_fn is not None)


def _changed(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    if len(before) == len(after) and all(map(is_, before.values(), after.values())) and before.keys() == after.keys():
        return  # as nearly every submodule, in a tenth of the time
    for key, value in after.items():
        if before.get(key, _ABSENT) is not value and key not in _NO_ATTRIBUTES:
            yield key
    for key in before.keys() - after.keys() - _NO_ATTRIBUTES:
        yield key


def _assign(holder: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        holder.pop(key, None)
    elif holder.get(key, _ABSENT) is not value:
        holder[key] = value


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

    def enter(self, first: bool) -> None:
        """Puts rates where they were when the group began, unless they were changed since by no turn."""
        now = self._taken()
        if first or not _same(now, self._after):
            self._start = now
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

    def _holders(self) -> list[dict[str, Any]]:
        groups = [group for optimizer in self._branches.optimizers for group in optimizer.param_groups]
        return [*groups, *(vars(each) for each in self._schedulers)]

    def _taken(self) -> list[dict[str, Any]]:
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
