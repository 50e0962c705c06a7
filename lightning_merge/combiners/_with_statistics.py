"""Combiners that weigh by statistics of each model."""

import os
from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, ClassVar, Self, TypeAlias

from torch import Tensor

from lightning_merge._checks import settle
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.importance import Statistics
from lightning_merge.importance._statistics import checked

Known: TypeAlias = Mapping[Any, Statistics | str | os.PathLike[str]]
"""Statistics, or the path of their file, by the label of the task: a number or a text."""


class WithStatistics(Combiner):
    """A combiner that looks up what it knows of a task's model under the task's label."""

    statistics: Mapping[int | str, Statistics]
    kinds: ClassVar[tuple[str, ...]]

    def __post_init__(self) -> None:
        settle(self, statistics=checked("statistics", self.statistics, self.kinds, type(self).__name__))

    @property
    def locality(self) -> Locality:
        return "tensor"

    def knowing(self, more: Known) -> Self:
        """The same rule that knows statistics of further tasks.

        Args:
            more: By label of the task; of a task that it knew, these count.

        Raises:
            ValueError: As for the rule itself.
        """
        return replace(self, statistics={**self.statistics, **more})  # type: ignore[type-var]

    def without(self, names: Iterable[str]) -> list[str]:
        """Those of the names that no task has statistics of, so that they are merged without.

        Args:
            names: Of tensors of the model.
        """
        return [name for name in names if not self._have(name)]

    def refuse_other_weights(self, task: int | str, weights: Mapping[str, Tensor], where: str) -> None:
        """Raises if a task's statistics were measured on other weights.

        Args:
            task: Its label.
            weights: Some tensors of its model.
            where: What messages call the model.

        Raises:
            ValueError: Naming the first tensor that differs.
        """
        self._of(task).refuse_other_weights(weights, where)

    def refuse_other_base(self, weights: Mapping[str, Tensor], where: str) -> None:
        """Raises if there are statistics of the base, and they were measured on other weights.

        Args:
            weights: Some tensors of the base.
            where: What messages call it.

        Raises:
            ValueError: Naming the first tensor that differs.
        """

    def _have(self, name: str) -> list[int | str]:
        """The tasks that have statistics of a tensor."""
        return [task for task, each in self.statistics.items() if each.aliases.get(name, name) in each.tensors]

    def _of(self, task: int | str) -> Statistics:
        if task not in self.statistics:
            known = ", ".join(repr(each) for each in list(self.statistics)[:8]) or "none"
            raise ValueError(f"`statistics` must hold those of every task, got none of task {task!r}, but of: {known}.")
        return self.statistics[task]

    @abstractmethod
    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        """What statistics of a tensor are shaped like."""

    def _refuse_unfit(self, task: int | str, like: Mapping[str, Tensor]) -> None:
        """Raises before anything is changed if a task's statistics are not of this model; reads none of them."""
        statistics = self._of(task)
        for name, tensor in like.items():
            found, expected = statistics.shape_of(name), self._shape(tensor)
            if found is not None and found != expected:
                raise ValueError(
                    f"{statistics.title} are of another model: of `{name}` they have shape {found} instead of"
                    f" {expected}."
                )
            if found is None and (others := self._have(name)):
                why = statistics.left_out.get(name, "it is not among them")
                raise ValueError(
                    f"`{name}` has no statistics of task {task!r} ({why}), and has some of task {others[0]!r}: measure"
                    " it for all models, or leave it out of all statistics."
                )
