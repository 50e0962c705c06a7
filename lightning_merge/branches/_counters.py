"""What the steps of an optimizer change outside of its state: counters in parameter groups, and in attributes.

Apex and Muon count their steps there, schedule-free optimizers weigh them, Prodigy keeps its estimate of the distance.
What schedules and users set there, as the learning rate, is no step's and one for all branches.
"""

from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any, TypeAlias, final

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_merge._whole_steps import hook_whole_steps
from lightning_merge.branches._watched import Contents, Reading, Watched, are_the_same, is_container

Counts: TypeAlias = dict[tuple[int, str], Any]
"""Values by the number of the group, -1 for the optimizer itself, and their name."""

_ABSENT = object()
_SET_BY_SCHEDULES = {"momentum", "betas", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_OF_TORCH = {*vars(torch.optim.SGD([torch.zeros(0)], 0.1)), "_opt_called", "_step_count", "grad_scale", "found_inf"}
_CLOSELY = 32
"""Steps after which all numbers are looked at. Later a write is seen where torch counts it."""


@final
class Counters:
    """Learns which values the steps of an optimizer change, and exchanges them.

    Args:
        optimizer: The optimizer; hooks on its step see what changes.
        others: Those whose groups are seen to already.
    """

    def __init__(self, optimizer: Optimizer, others: Sequence[Optimizer] = ()) -> None:
        self.optimizer = optimizer
        self.owned: list[tuple[int, str]] = []
        known = {id(group) for other in others for group in other.param_groups}
        self._apart = any(id(group) not in known for group in optimizer.param_groups)
        self._start: Counts = {}  # before the first step that changed it
        self._watched: Watched | None = None
        self._seen_groups: list[dict[str, Any]] = []
        self._values: list[Any] = []
        self._noted: tuple[list[Any], Reading] | None = None  # when the copies were made
        self._before: Counts = {}  # a step
        self._copies: Counts = {}  # of what a step may write to
        self._compared = 0
        self._look()
        self._first: Counts = {where: self._copy(value) for where, value in self._seen().items()}  # as it was made
        self._hooks: Sequence[RemovableHandle] = hook_whole_steps(optimizer, self._note, self._compare)

    def take(self) -> Counts:
        """A copy of what there is now."""
        return {where: self._copy(self._holder(where).get(where[1], _ABSENT)) for where in self.owned}

    def exchange(self, incoming: Mapping[tuple[int, str], Any]) -> Counts:
        """Puts values in place and returns those that were. What is missing is as it was before the first step."""
        before: Counts = {}
        for where in self.owned:
            holder, key = self._holder(where), where[1]
            before[where] = holder.get(key, _ABSENT)
            value = incoming[where] if where in incoming else self._copy(self._start[where])
            if value is _ABSENT:
                holder.pop(key, None)
            else:
                holder[key] = value
        return before

    def first(self) -> Counts:
        """A copy of what there was when the optimizer was made."""
        return {where: self._copy(self._first.get(where, _ABSENT)) for where in self.owned}

    def copied(self, counts: Mapping[tuple[int, str], Any]) -> Counts:
        """A copy with values of its own."""
        return {where: self._copy(value) for where, value in counts.items()}

    def saved(self, counts: Mapping[tuple[int, str], Any]) -> list[list[Any]]:
        """Those of groups, for a file: optimizers save no attributes."""
        return [[*where, value] for where, value in counts.items() if where[0] >= 0 and value is not _ABSENT]

    def restored(self, saved: Sequence[Sequence[Any]]) -> Counts:
        """What ``saved`` gave."""
        found: Counts = {(group, key): self._copy(value) for group, key, value in saved}
        for where in found:
            self._own(where, self._holder(where).get(where[1], _ABSENT))
        return found

    def refuse_without_mean(self) -> None:
        """Checks that steps change single numbers only, beside the state of each parameter.

        Raises:
            ValueError: If they change tensors, as those of an optimizer that keeps slow weights in a dict of its own.
        """
        for where in self.owned:
            tensors = Contents([self._holder(where).get(where[1])], self._is_left_out).tensors
            if any(tensor.numel() > 1 for tensor in tensors):
                raise ValueError(
                    f"`optimizer_state` 'average' is for what an optimizer keeps in its `state`, and"
                    f" {type(self.optimizer).__name__} keeps tensors in `{where[1]}`, of which no mean is known. Take"
                    " 'keep' or 'reset'."
                )

    def forget(self) -> None:
        """The hooks go, and what is the optimizer's."""
        for hook in self._hooks:
            hook.remove()
        self._first, self._before, self._copies = {}, {}, {}
        self._watched, self._noted, self._seen_groups = None, None, []
        self._take_in([])

    # ---- where

    @property
    def _groups(self) -> list[dict[str, Any]]:
        """The groups that no other sees to."""
        return self.optimizer.param_groups if self._apart else []

    def _holder(self, where: tuple[int, str]) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        if where[0] < 0:
            return vars(self.optimizer)
        return groups[where[0]] if where[0] < len(groups) else {}

    def _is_left_out(self, tensor: Tensor) -> bool:
        """Parameters, of which branches have their own, and what is computed anew."""
        return id(tensor) in self._parameters or tensor.grad_fn is not None

    # ---- what steps change

    def _look(self) -> None:
        """Finds out which values there are that a step may change and no schedule does."""
        self._parameters = {id(p) for group in self.optimizer.param_groups for p in group["params"]}
        self._seen_groups = list(self._groups)
        ignored = [{"params", *_SET_BY_SCHEDULES} for _ in self._seen_groups] + [set(_OF_TORCH)]
        for group, keys in zip(self._seen_groups, ignored, strict=False):
            if "initial_lr" in group:  # without a schedule the rate may be its own, as that of hypergradient descent
                keys.add("lr")
        for number, key in self.owned:
            if number < len(self._seen_groups):
                ignored[number].add(key)
        self._watched = Watched([*self._seen_groups, vars(self.optimizer)], ignored)
        self._take_in(self._watched.values() or [])

    def _take_in(self, values: list[Any]) -> None:
        self._values, self._contents = values, Contents(values, self._is_left_out)

    def _now(self) -> tuple[list[Any], Reading]:
        """What there is, to be held against what there is later."""
        values = None if self._watched is None else self._watched.values()
        if values is None or not are_the_same(self._seen_groups, self._groups):
            self._look()
        elif not are_the_same(values, self._values):
            self._take_in(values)
        return self._values, self._contents.read()

    def _seen(self) -> Counts:
        places = () if self._watched is None else self._watched.places
        count = len(self._seen_groups)
        return {
            (number if number < count else -1, key): value
            for (number, key), value in zip(places, self._values, strict=True)
        }

    def _note(self, *_: Any) -> None:
        now = self._now()
        if self._noted is None or not _are_alike(now, self._noted):
            self._noted, self._before = now, self._seen()
            self._copies = {w: self._copy(v) for w, v in self._before.items() if _is_writable(v)}

    def _compare(self, *_: Any) -> None:
        groups = len(self._seen_groups)
        now, noted = self._now(), self._noted
        self._compared += 1
        looks_closely = self._compared <= _CLOSELY and self._contents.tensors
        if noted is None or (_are_alike(now, noted) and not looks_closely):
            return  # as nearly always
        for where, value in self._seen().items():
            before = self._before.get(where, _ABSENT)
            kept = self._copies.get(where, before)
            if where[0] >= groups or (where[0] < 0 and not _is_kept(before, value)):
                continue  # of a group that the step has added; or an attribute that is worked out once
            if _differ(kept, value):
                self._own(where, kept)
        if not _are_alike(now, noted):
            self._noted = None

    def _own(self, where: tuple[int, str], before: Any) -> None:
        if where not in self._start:
            self.owned.append(where)
            self._start[where] = self._copy(before)
            self._watched, self._noted = None, None

    def _copy(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value if self._is_left_out(value) else value.detach().clone()
        if type(value) is tuple:
            return tuple(map(self._copy, value))
        if not is_container(value):
            return value
        new = copy(value)
        if isinstance(new, dict | list | deque):
            for key, item in list(new.items() if isinstance(new, dict) else enumerate(new)):
                new[key] = self._copy(item)
        return new


def largest(found: Sequence[Counts]) -> Counts:
    """Of each number the largest over branches."""
    new: Counts = {}
    for where in dict.fromkeys(where for each in found for where in each):
        values = [each[where] for each in found if where in each]
        numbers = all(isinstance(each, int | float) or _is_number(each) for each in values)
        new[where] = max(values, key=float) if numbers else values[0]
    return new


def each_of(optimizers: Sequence[Optimizer]) -> list[Counters]:
    """The counters of every optimizer, of groups that several share once."""
    return [Counters(optimizer, optimizers[:number]) for number, optimizer in enumerate(optimizers)]


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def _is_writable(value: Any) -> bool:
    return isinstance(value, Tensor | tuple) or is_container(value)


def _is_kept(before: Any, after: Any) -> bool:
    """Whether what a step has made of an attribute is something to remember, and not worked out once for all."""
    if isinstance(after, int | float):
        return isinstance(before, int | float)
    return isinstance(after, Tensor) or is_container(after)


def _are_alike(one: tuple[list[Any], Reading], other: tuple[list[Any], Reading]) -> bool:
    return are_the_same(one[0], other[0]) and one[1].is_as(other[1])


def _differ(before: Any, after: Any) -> bool:
    if before is after:
        return False
    try:
        if isinstance(before, Tensor) and isinstance(after, Tensor):
            return before.shape != after.shape or not bool((before == after).all())
        if isinstance(before, dict) and isinstance(after, dict):
            return before.keys() != after.keys() or any(_differ(before[key], after[key]) for key in before)
        if isinstance(before, list | tuple | deque) and isinstance(after, list | tuple | deque):
            return len(before) != len(after) or any(map(_differ, before, after))
        return isinstance(before, Tensor) or isinstance(after, Tensor) or bool(before != after)
    except Exception:  # values that do not compare
        return True
