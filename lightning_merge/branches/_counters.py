"""What the steps of an optimizer change outside of its state: counters in parameter groups, and in attributes.

Apex and Muon count their steps there, schedule-free optimizers weigh them, Prodigy keeps its estimate of the distance.
What schedules and users set there, as the learning rate, is no step's and one for all branches.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any, TypeAlias, final

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_merge._whole_steps import hook_whole_steps

Counts: TypeAlias = dict[tuple[int, str], Any]
"""Values by the number of the group, -1 for the optimizer itself, and their name."""

_ABSENT = object()
_SET_BY_SCHEDULES = {"momentum", "betas", "initial_lr", "max_lr", "min_lr", "base_momentum", "max_momentum", "swa_lr"}
_OF_TORCH = {"_opt_called", "_step_count", "grad_scale", "found_inf"}


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
        self._first: Counts = {where: _copy(value) for where, value in self._seen().items()}  # as it was made
        self._start: Counts = {}  # before the first step that changed it
        self._groups = 0  # before the step
        self._before: Counts = {}
        self._copies: Counts = {}  # of what a step may write to
        self._versions: dict[tuple[int, str], int] = {}
        self._hooks: Sequence[RemovableHandle] = hook_whole_steps(optimizer, self._note, self._compare)

    def take(self) -> Counts:
        """A copy of what there is now."""
        return {where: _copy(self._holder(where).get(where[1], _ABSENT)) for where in self.owned}

    def exchange(self, incoming: Mapping[tuple[int, str], Any]) -> Counts:
        """Puts values in place and returns those that were. What is missing is as it was before the first step."""
        before: Counts = {}
        for where in self.owned:
            holder, key = self._holder(where), where[1]
            before[where] = holder.get(key, _ABSENT)
            value = incoming[where] if where in incoming else _copy(self._start[where])
            if value is _ABSENT:
                holder.pop(key, None)
            else:
                holder[key] = value
        return before

    def first(self) -> Counts:
        """A copy of what there was when the optimizer was made."""
        return {where: _copy(self._first.get(where, _ABSENT)) for where in self.owned}

    def saved(self, counts: Mapping[tuple[int, str], Any]) -> list[list[Any]]:
        """Those of groups, for a file: optimizers save no attributes."""
        return [[*where, value] for where, value in counts.items() if where[0] >= 0 and value is not _ABSENT]

    def restored(self, saved: Sequence[Sequence[Any]]) -> Counts:
        """What ``saved`` gave."""
        found: Counts = {(group, key): _copy(value) for group, key, value in saved}
        for where in found:
            self._own(where, self._holder(where).get(where[1], _ABSENT))
        return found

    def forget(self) -> None:
        """The hooks go."""
        for hook in self._hooks:
            hook.remove()

    # ----

    def _holder(self, where: tuple[int, str]) -> dict[str, Any]:
        groups = self.optimizer.param_groups
        if where[0] < 0:
            return vars(self.optimizer)
        return groups[where[0]] if where[0] < len(groups) else {}

    def _seen(self) -> Counts:
        """What a step may change and no schedule does."""
        found: Counts = {}
        for number, group in enumerate(self.optimizer.param_groups if self._apart else ()):
            for key, value in group.items():
                # Of an optimizer without a schedule the rate may be its own, as that of hypergradient descent.
                scheduled = key in _SET_BY_SCHEDULES or (key == "lr" and "initial_lr" in group)
                if key != "params" and not scheduled:
                    found[number, key] = value
        for key, value in vars(self.optimizer).items():
            if key not in _OF_TORCH and (isinstance(value, int | float) or _is_number(value)):
                found[-1, key] = value
        return found

    def _note(self, *_: Any) -> None:
        seen = self._seen()
        for where in self.owned:
            seen.pop(where, None)
        self._before, self._groups = seen, len(self.optimizer.param_groups)
        writable = {where: value for where, value in seen.items() if isinstance(value, Tensor | dict | list | set)}
        self._copies = copied(writable)
        self._versions = {where: value._version for where, value in writable.items() if isinstance(value, Tensor)}

    def _compare(self, *_: Any) -> None:
        known = set(self.owned)
        for where, value in self._seen().items():
            before = self._before.get(where, _ABSENT)
            is_written = where in self._copies and self._versions.get(where) != getattr(value, "_version", -1)
            is_new = value is not before or is_written
            kept = self._copies.get(where, before)
            if before is _ABSENT and not 0 <= where[0] < self._groups:
                continue  # an attribute that was no number: something that is worked out once; or a new group
            if is_new and where not in known and _differ(kept, value):
                self._own(where, kept)
        self._before, self._copies, self._versions = {}, {}, {}

    def _own(self, where: tuple[int, str], before: Any) -> None:
        if where not in self._start:
            self.owned.append(where)
            self._start[where] = _copy(before)


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


def copied(counts: Mapping[tuple[int, str], Any]) -> Counts:
    """A copy with values of its own."""
    return {where: _copy(value) for where, value in counts.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and not value.is_complex()


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return deepcopy(value) if isinstance(value, dict | list | set) else value


def _differ(before: Any, after: Any) -> bool:
    if isinstance(before, Tensor) and isinstance(after, Tensor):
        return before.shape != after.shape or not bool((before == after).all())
    if isinstance(before, Tensor) or isinstance(after, Tensor):
        return True
    try:
        return bool(before != after)
    except Exception:  # a value that does not compare
        return before is not after
