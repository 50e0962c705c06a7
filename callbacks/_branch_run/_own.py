"""What of a module belongs to a branch while it has its turn, beside weights, buffers and optimizer state."""

import inspect
from functools import cache
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_merge.branches import Branches
from lightning_merge.branches._watched import Place, Watched, are_the_same
from lightning_merge.callbacks._branch_run._kept import is_shared
from lightning_merge.callbacks._branch_run._written import Written, storage_of
from lightning_merge.weights import is_metric

_ABSENT = object()
_NO_ATTRIBUTES = frozenset(vars(nn.Module())) | frozenset(vars(LightningModule()))


@final
class OwnAttributes:
    """Plain attributes that a training step assigns on the module or writes into, as a hidden state: each branch's own.

    Buffers that are not saved are such attributes too. Shared are metrics, plain numbers, which count the steps of all
    (but where steps write into tensors or containers of the same submodule), what steps make longer, which records
    them, and what torch declares as settings of its layers, as a stride. What is assigned or written between the turns
    is for all.

    Args:
        branches: The branches; their inventory knows when submodules come and go.
        title: What messages call them.
    """

    def __init__(self, branches: Branches, title: str) -> None:
        self._branches = branches
        self._version = -1
        self._modules: list[tuple[str, nn.Module]] = []
        self._with_buffers: list[int] = []  # that are not saved, as attributes are not: numbers of such modules
        self._holders: list[dict[str, Any]] = []
        self._settings: list[frozenset[str]] = []  # by holder
        self._watched = Watched([], [])
        self._written = Written(title)
        self._known = set[int]()  # storages and submodules that are the branches' anyway
        self._known_at = -1
        self._looked_through: list[Place] = []
        self._before: list[Any] = []
        self._start: dict[Place, Any] = {}  # as it was before the first turn that assigned it
        self._left: dict[Place, Any] = {}  # as the last turn left it
        self._kept: dict[int, dict[Place, Any]] = {}
        self._last = -1  # branch whose are in place

    def enter(self, branch: int, *, again: bool) -> None:
        """Puts those of a branch in place.

        Args:
            branch: Its number.
            again: Whether nothing but the exchange of weights has happened since ``leave``.
        """
        if self._find() or not again or self._left:
            self._assign(branch)
        if not again:
            self._written.take_in()
        if self._written.is_stale or not self._written.knows(self._before):
            self._look_through()
        self._written.put(branch)

    def _assign(self, branch: int) -> None:
        """Puts the values of a branch in place, and notes what there is."""
        own = self._kept.get(branch, {})
        for place, left in self._left.items():
            holder, key = self._holders[place[0]], place[1]
            now = holder.get(key, _ABSENT)
            if now is not left:
                self._start[place] = now
                for kept in self._kept.values():
                    kept.pop(place, None)
            _put(holder, key, own.get(place, self._start[place]))
        self._before = self._read()

    def _read(self) -> list[Any]:
        values = self._watched.values()
        if values is None:
            self._watched = Watched(self._holders, self._settings)
            values = self._watched.values()
        return values or []

    def leave(self, branch: int) -> None:
        """Keeps what the turn has assigned."""
        self._written.leave(branch)
        places = self._watched.places
        now = self._read()
        if places is not self._watched.places or not are_the_same(self._before, now):
            before = dict(zip(places, self._before, strict=True))
            after = dict(zip(self._watched.places, now, strict=True))
            with_state = {self._looked_through[each][0] for each in self._written.places}
            for place in {**before, **after}:
                value = before.get(place, _ABSENT)
                # A number beside what a step writes into is its position, or its count.
                now_there = after.get(place)
                is_own = not is_shared(now_there) or (place[0] in with_state and not isinstance(now_there, Tensor))
                if is_own and value is not after.get(place, _ABSENT) and place not in self._start:
                    self._start[place] = value
        self._before = now
        if self._start:
            self._left = {(number, key): self._holders[number].get(key, _ABSENT) for number, key in self._start}
            self._kept[branch] = dict(self._left)
        self._last = branch

    def forget(self, branches: set[int]) -> None:
        """Branches go on from what there was before their first turn: theirs is the trace of what made them diverge.

        Args:
            branches: Their numbers.
        """
        for branch in branches:
            self._kept.pop(branch, None)
            if branch == self._last:
                for place, start in self._start.items():
                    _put(self._holders[place[0]], place[1], start)
                    self._left[place] = start
            self._written.forget(branch)

    def _look_through(self) -> None:
        """Looks what there is through for what a step may write into, of the module's own."""
        owners = [*range(len(self._modules)), *self._with_buffers]
        prefixes = [self._modules[number][0] for number in owners]
        self._looked_through = self._watched.places
        names = [f"{prefixes[number]}.{key}".lstrip(".") for number, key in self._watched.places]
        if self._known_at != self._version:
            branches, self._known_at = self._branches, self._version
            sets = [branches.inventory.tensors, *(branches.weights(branch) for branch in branches.own)]
            self._known = {storage_of(tensor) for each in sets for tensor in each.values()}
            self._known |= {id(module) for _, module in self._modules}
        self._written.look(names, self._before, self._known)

    def _find(self) -> bool:
        """Finds the submodules; whether they are others than before."""
        found = False
        if self._version != self._branches.inventory.version:
            self._version = self._branches.inventory.version
            self._modules = [
                (name, each)
                for name, each in self._branches.module.named_modules()
                if not is_metric(each) and not isinstance(each, torch.jit.ScriptModule)
            ]
            self._with_buffers = [n for n, (_, each) in enumerate(self._modules) if each._non_persistent_buffers_set]
            holders: list[dict[str, Any]] = [vars(each) for _, each in self._modules]
            holders += [self._modules[number][1]._buffers for number in self._with_buffers]
            found = not are_the_same(holders, self._holders)
            if found:
                self._holders = holders
                kinds: list[Any] = [type(each) for _, each in self._modules]
                self._settings = [_settings_of(kind) for kind in kinds]
                for number in self._with_buffers:
                    each = self._modules[number][1]
                    self._settings.append(frozenset(each._buffers.keys() - each._non_persistent_buffers_set))
                self._watched = Watched(holders, self._settings)
                self._start, self._left, self._kept = {}, {}, {}
        return found


@cache
def _settings_of(cls: type) -> frozenset[str]:
    """What every module has, and what classes of torch declare as settings of their layers."""
    own = [base for base in cls.__mro__ if base.__module__.startswith("torch.nn.modules.")]
    constants = {name for base in own for name in vars(base).get("__constants__", ())}
    return _NO_ATTRIBUTES | constants | {name for base in own for name in inspect.get_annotations(base)}


def _put(holder: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        holder.pop(key, None)
    elif holder.get(key, _ABSENT) is not value:
        holder[key] = value
