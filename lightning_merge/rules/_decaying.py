"""What the means share that stand for a learning rate that decays: the shape and the window."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from lightning_merge._checks import one_of, settle, whole
from lightning_merge.rules._base import Rule
from lightning_merge.schedules import Duration, RunLength
from lightning_merge.schedules._before_end import times_within
from lightning_merge.schedules._decay import Decay
from lightning_merge.weights import State

SHAPES = "'linear', 'cosine', '1-sqrt' or 'exponential'"


@dataclass(frozen=True)
class Decaying(Rule):
    """A mean of the weights of a window, under weights that a shape of decay gives."""

    callback: ClassVar[str] = "Anneal"

    shape: Decay = "linear"
    window: float | str | Duration = "20%"
    steps_per_update: int = 1

    def __post_init__(self) -> None:
        one_of("shape", self.shape, Decay, SHAPES)
        settle(self, window=Duration.parse(self.window, "window"))
        settle(self, steps_per_update=whole("steps_per_update", self.steps_per_update, 1))
        if isinstance(self.window, Duration) and self.window.unit == "steps":
            times_within(self.window, self.steps_per_update, RunLength())

    @property
    def can_be_undone(self) -> bool:
        return True

    @property
    def snapshots(self) -> int:
        """Weights in a window, ``n``."""
        return times_within(self.window, self.steps_per_update, RunLength())

    @property
    def plan(self) -> list[Any]:
        """What the weights of a window depend on, as a state keeps it that has begun one."""
        return [self.shape, self.snapshots]

    def began_as(self, state: State) -> list[Any]:
        """The ``plan`` that the window in a state began with.

        Args:
            state: As ``init`` made it.
        """
        plan: list[Any] = state.get("plan", self.plan)  # files of before had none
        return plan

    def resolve(self, run: RunLength) -> Self:
        steps = times_within(self.window, self.steps_per_update, run) * self.steps_per_update
        return replace(self, window=Duration(float(steps)))
