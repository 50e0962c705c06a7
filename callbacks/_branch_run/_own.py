"""What of a module belongs to a branch while it has its turn, beside weights, buffers and optimizer state."""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from operator import call, is_, itemgetter
from typing import Any, TypeAlias, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_merge.branches import Branches
from lightning_merge.weights import is_metric

_ABSENT = object()
_NO_ATTRIBUTES = frozenset(vars(nn.Module())) | frozenset(vars(LightningModule()))
Place: TypeAlias = tuple[int, str]
"""Which submodule and which attribute."""


@final
class OwnAttributes:
    """Plain attributes that a training step assigns on the module, as a hidden state: each branch has its own.

    Shared are what a step writes into (lists, dicts, metrics), plain numbers, which count the steps of all, and what
    torch declares as settings of its layers, as a stride. What is assigned between the turns is for all.

    Args:
        branches: The branches; their inventory knows when submodules come and go.
    """

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._version = -1
        self._holders: list[dict[str, Any]] = []
        self._settings: list[frozenset[str]] = []  # by submodule
        self._watched = _Watched([], [])
        self._before: list[Any] = []
        self._start: dict[Place, Any] = {}  # as it was before the first turn that assigned it
        self._left: dict[Place, Any] = {}  # as the last turn left it
        self._kept: dict[int, dict[Place, Any]] = {}

    def enter(self, branch: int, *, again: bool) -> None:
        """Puts those of a branch in place.

        Args:
            branch: Its number.
            again: Whether nothing but the exchange of weights has happened since ``leave``.
        """
        if not self._find() and again and not self._left:
            return  # `leave` has just read them
        own = self._kept.get(branch, {})
        for place, left in self._left.items():
            holder, key = self._holders[place[0]], place[1]
            now = holder.get(key, _ABSENT)
            if now is not left:
                self._start[place] = now
                for kept in self._kept.values():
                    kept.pop(place, None)
            _assign(holder, key, own.get(place, self._start[place]))
        values = self._watched.values()
        if values is None:
            self._watched = _Watched(self._holders, self._settings)
            values = self._watched.values()
        self._before = values or []

    def leave(self, branch: int) -> None:
        """Keeps what the turn has assigned."""
        now, was = self._watched.values(), self._watched
        if now is None or not all(map(is_, self._before, now)):
            before = dict(zip(was.places, self._before, strict=True))
            if now is None:
                self._watched = _Watched(self._holders, self._settings)
                now = self._watched.values() or []
            after = dict(zip(self._watched.places, now, strict=True))
            for place in {**before, **after}:
                value = before.get(place, _ABSENT)
                is_assigned = value is not after.get(place, _ABSENT) and not _is_shared(after.get(place))
                if is_assigned and place not in self._start:
                    self._start[place] = value
        self._before = now
        self._left = {(number, key): self._holders[number].get(key, _ABSENT) for number, key in self._start}
        self._kept[branch] = dict(self._left)

    def _find(self) -> bool:
        """Finds the submodules; whether they are others than before."""
        found = False
        if self._version != self._branches.inventory.version:
            self._version = self._branches.inventory.version
            modules = [
                each
                for each in self._branches.module.modules()
                if not is_metric(each) and not isinstance(each, torch.jit.ScriptModule)
            ]
            holders = list(map(vars, modules))
            found = [id(each) for each in holders] != [id(each) for each in self._holders]
            if found:
                self._holders = holders
                kinds: list[Any] = list(map(type, modules))
                self._settings = [_settings_of(kind) for kind in kinds]
                self._watched = _Watched(holders, self._settings)
                self._start, self._left, self._kept = {}, {}, {}
        return found


@final
class _Watched:
    """The plain attributes of many objects, read at every turn.

    A step has driven them out of the caches, so each object that is touched costs a tenth of a microsecond. Of a
    submodule, therefore, the number of attributes is read, and the values of those that are no settings. None is left
    out for what its class is, since a training step may give any of them a new attribute.
    """

    def __init__(self, holders: Sequence[dict[str, Any]], settings: Sequence[frozenset[str]]) -> None:
        self._holders = holders
        self._sizes = list(map(len, holders))
        self.places: list[Place] = []
        self._readers: list[Callable[[dict[str, Any]], tuple[Any, ...]]] = []
        self._read: list[dict[str, Any]] = []
        for number, (holder, known) in enumerate(zip(holders, settings, strict=True)):
            keys = [key for key in holder if key not in known]
            if keys:
                keys = keys * 2 if len(keys) == 1 else keys  # of one key there would be no tuple
                self.places += [(number, key) for key in keys]
                self._readers.append(itemgetter(*keys))
                self._read.append(holder)

    def values(self) -> list[Any] | None:
        """What there is at each place, or nothing if attributes have come or gone."""
        if list(map(len, self._holders)) != self._sizes:
            return None
        try:
            return list(chain.from_iterable(map(call, self._readers, self._read)))
        except KeyError:
            return None


@cache
def _settings_of(cls: type) -> frozenset[str]:
    """What every module has, and what classes of torch declare as settings of their layers."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules.")]
    constants = {name for base in own for name in vars(base).get("__constants__", ())}
    return _NO_ATTRIBUTES | constants | {name for base in own for name in inspect.get_annotations(base)}


def _is_shared(value: Any) -> bool:
    """A number, or what is computed anew in every forward pass, as the weight of a parametrisation."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.grad_fn is not None)


def _assign(holder: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        holder.pop(key, None)
    elif holder.get(key, _ABSENT) is not value:
        holder[key] = value
