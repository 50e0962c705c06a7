"""The tasks of a stream, as a config describes them."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch

from lightning_merge.continual import Split
from lightning_merge.recipes.streams._tasks import TaskData, split_by_class, split_by_domain


@dataclass(frozen=True)
class Stream:
    """The tasks of a stream, and the training of the base before them.

    Args:
        classes: Number of classes of the data; at least 2.
        tasks: Number of tasks; at least 1.
        scenario: ``class``: tested among all classes seen so far. ``task``: the task is told. ``domain``: all classes
            in every task, images turned by 0, 90, 180, ... degrees (at most 4 tasks).
        held_out: Classes that are in no task, for the base; at least 0.
        base_epochs: Epochs that the base trains on them; the base is as initialised if it is 0.
        order: Seed of the order of classes or domains; ``null`` keeps it.

    Raises:
        ValueError: If a value is out of range, or classes are held out for no base.
    """

    classes: int
    tasks: int = 5
    scenario: Literal["class", "task", "domain"] = "class"
    held_out: int = 0
    base_epochs: int = 0
    order: int | None = 0

    def __post_init__(self) -> None:
        for name, least in (("classes", 2), ("tasks", 1), ("held_out", 0), ("base_epochs", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"`stream.{name}` must be at least {least}, got {getattr(self, name)}.")
        if (self.held_out > 0) != (self.base_epochs > 0):
            raise ValueError(
                "`stream.held_out` and `stream.base_epochs` must both be 0 or neither: classes are held out to train"
                f" the base, got {self.held_out} classes and {self.base_epochs} epochs."
            )
        if self.scenario == "domain" and (self.tasks > 4 or self.held_out):
            raise ValueError(
                "`stream.tasks` must be at most 4 and `stream.held_out` 0 for `stream.scenario=domain`, got"
                f" {self.tasks} and {self.held_out}."
            )

    def of(self, data: Any) -> tuple[list[TaskData], TaskData | None]:
        """The tasks, and the data of the base."""
        if self.scenario == "domain":
            turned = {f"turned{90 * k}": partial(torch.rot90, k=k, dims=(-2, -1)) for k in range(self.tasks)}
            return split_by_domain(data, turned, self.order), None
        order = Split.of(self.classes, tasks=1, seed=self.order).tasks[0]
        split = Split(Split.of(order[self.held_out :], self.tasks, seed=None).tasks, self.scenario, self.order)
        held_out = order[: self.held_out]
        return split_by_class(data, split), TaskData(data, "base", held_out, held_out) if held_out else None
