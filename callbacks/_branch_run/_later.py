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
    early. Weights, rates and what else belongs to a branch are seen to elsewhere.

    Args:
        branches: The branches.
    """

    def __init__(self, branches: Branches) -> None:
        self._branches = branches
        self._is_overridden = overrides_step(branches.module)
        self._at_step: _Switches | None = None
        self._due: list[Callable[[], object]] = []

    def stepped(self) -> None:
        """Notes what there is, right after an optimizer has stepped."""
        module = self._branches.module
        if self._is_overridden or not getattr(module, "automatic_optimization", True):
            self._at_step = _Switches(self._branches)

    def leave(self) -> None:
        """The turn is over: undoes what was changed since its step."""
        if (at_step := self._at_step) is not None:
            self._at_step = None
            self._due += at_step.undone(numbers=self._is_overridden)

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
        self._before = [dict(holder) for holder in self._holders]
        self._groups = [(o, [(g, list(g["params"])) for g in o.param_groups]) for o in branches.optimizers]

    def undone(self, *, numbers: bool) -> list[Callable[[], object]]:
        """Puts things back as they were, and gives what does them again."""
        return [*self._frozen(), *self._assigned(numbers=numbers), *self._grouped()]

    def _frozen(self) -> list[Callable[[], object]]:
        again: list[Callable[[], object]] = []
        for parameter, before in zip(self._parameters, self._trained, strict=True):
            if parameter.requires_grad != before:
                parameter.requires_grad_(before)
                again.append(partial(parameter.requires_grad_, not before))
        return again

    def _assigned(self, *, numbers: bool) -> list[Callable[[], object]]:
        values, before = (list(chain.from_iterable(map(dict.values, each))) for each in (self._holders, self._before))
        if are_the_same(values, before):
            return []  # as nearly always
        again: list[Callable[[], object]] = []
        for holder, known in zip(self._holders, self._before, strict=True):
            for key, after in list(holder.items()):
                value = known.get(key)  # nothing, where there was only the class's own
                is_one = isinstance(after, int | float) and isinstance(value, int | float | None)
                if after is not value and is_one and (numbers or key == "training"):
                    if key in known:
                        holder[key] = value
                    else:
                        del holder[key]
                    again.append(partial(setitem, holder, key, after))
        return again

    def _grouped(self) -> list[Callable[[], object]]:
        again: list[Callable[[], object]] = []
        for optimizer, before in self._groups:
            known = [group for group, _ in before]
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
