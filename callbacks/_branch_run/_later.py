"""What a turn changes after its step: for the branches whose turns follow, that is still to come."""

from collections.abc import Callable
from functools import partial
from itertools import chain
from operator import setitem
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from torch import nn

from lightning_merge.branches import Branches
from lightning_merge.branches._watched import are_the_same
from lightning_merge.weights import is_metric


@final
class Later:
    """Puts off what is changed between the step of a turn and its end, until every branch of the group has stepped.

    That is what is frozen, which submodules are in training mode, the parameter groups of optimizers, and, where it is
    the module's ``optimizer_step`` that changes them, numbers that are attributes. So a branch that unfreezes a layer
    after its fifth step trains as a run without others does, and the branches after it do not have the layer one step
    early. Weights, rates and what else belongs to a branch are seen to elsewhere. What only stood still for the step,
    as the parameters of a discriminator while a generator is toggled, is left as it is.

    Args:
        branches: The branches.
    """

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._is_overridden = overrides_step(branches.module)
        self._at_start: _Switches | None = None
        self._at_step: _Switches | None = None
        self._due: list[Callable[[], object]] = []

    def enter(self) -> None:
        """A turn begins."""
        if self._is_overridden or not getattr(self._branches.module, "automatic_optimization", True):
            self._at_start = _Switches(self._branches)

    def stepped(self) -> None:
        """Notes what there is, right after an optimizer has stepped."""
        if self._at_start is not None:
            self._at_step = _Switches(self._branches)

    def leave(self) -> None:
        """The turn is over: undoes what was changed since its step."""
        at_start, at_step = self._at_start, self._at_step
        self._at_start = self._at_step = None
        if at_start is not None and at_step is not None:
            self._due += at_step.undone(at_start, numbers=self._is_overridden)

    def group_over(self) -> None:
        """Every branch has stepped: what was put off is done."""
        due, self._due = self._due, []
        for do in due:
            do()


class _Switches:
    def __init__(self, branches: Branches) -> None:
        self._parameters = list(branches.module.parameters())
        self._trained = [parameter.requires_grad for parameter in self._parameters]
        self._holders = [vars(each) for each in branches.module.modules() if not is_metric(each)]
        self._values = [dict(holder) for holder in self._holders]
        self._groups = [(optimizer, list(optimizer.param_groups)) for optimizer in branches.optimizers]

    def undone(self, start: "_Switches", *, numbers: bool) -> list[Callable[[], object]]:
        """Puts back what is as it was neither then nor at the start, and gives what does it again."""
        return [*self._frozen(start), *self._assigned(start, numbers=numbers), *self._grouped()]

    def _frozen(self, start: "_Switches") -> list[Callable[[], object]]:
        before = dict(zip(map(id, start._parameters), start._trained, strict=True))
        again: list[Callable[[], object]] = []
        for parameter, then in zip(self._parameters, self._trained, strict=True):
            if parameter.requires_grad not in (then, before.get(id(parameter), then)):
                parameter.requires_grad_(then)
                again.append(partial(parameter.requires_grad_, not then))
        return again

    def _assigned(self, start: "_Switches", *, numbers: bool) -> list[Callable[[], object]]:
        now, then = (list(chain.from_iterable(map(dict.values, each))) for each in (self._holders, self._values))
        if are_the_same(now, then):
            return []  # as nearly always
        before = dict(zip(map(id, start._holders), start._values, strict=True))
        again: list[Callable[[], object]] = []
        for holder, known in zip(self._holders, self._values, strict=True):
            first = before.get(id(holder), known)
            for key, after in list(holder.items()):
                value = known.get(key)  # nothing, where there was only the class's own
                is_one = isinstance(after, int | float) and isinstance(value, int | float | None)
                is_other = after is not value and after is not first.get(key)
                if is_one and is_other and (numbers or key == "training"):
                    if key in known:
                        holder[key] = value
                    else:
                        del holder[key]
                    again.append(partial(setitem, holder, key, after))
        return again

    def _grouped(self) -> list[Callable[[], object]]:
        again: list[Callable[[], object]] = []
        for optimizer, known in self._groups:
            new = [group for group in optimizer.param_groups if not any(group is each for each in known)]
            if new and are_the_same(optimizer.param_groups[: len(known)], known):
                del optimizer.param_groups[len(known) :]
                again += [partial(_add, optimizer, group) for group in new]
        return again


def _add(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> None:
    """Adds a parameter group, unless another branch has added one of the same parameters."""
    known = {id(parameter) for each in optimizer.param_groups for parameter in each["params"]}
    if known.isdisjoint(map(id, group["params"])):
        optimizer.param_groups.append(group)


def overrides_step(module: nn.Module) -> bool:
    """Whether a LightningModule has an ``optimizer_step`` of its own, so that it may do something after a step."""
    own = getattr(module, "optimizer_step", None)
    function = getattr(own, "__func__", own)
    return getattr(function, "__module__", "") not in (LightningModule.__module__, "pytorch_lightning.core.module")
