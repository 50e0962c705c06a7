"""The last part of a run."""

from dataclasses import dataclass
from typing import final

from lightning_merge._checks import settle, whole
from lightning_merge.schedules._duration import Duration
from lightning_merge.schedules._every import EveryNSteps
from lightning_merge.schedules._moment import Moment, RunLength, Schedule


@final
@dataclass(frozen=True)
class BeforeEnd(Schedule):
    """Every ``n`` steps of the last ``window`` of a run, so that the last step is one of them.

    Args:
        window: A number of optimizer steps, ``"500 steps"``, ``"2 epochs"`` or ``"20%"`` of the run; at least ``n``
            steps. The times are ``T, T - n, T - 2n, ...`` as far as ``window`` reaches, for a run of ``T`` steps.
        n: Applied optimizer steps between updates; at least 1.

    Raises:
        ValueError: If an argument is out of range, or at ``resolve`` if the run's length is not known or the window is
            longer.

    Example:
        >>> schedule = BeforeEnd("50%", n=2).resolve(RunLength(steps=11))
        >>> [step for step in range(12) if schedule.due(Moment(step, epoch=0))]
        [9, 11]
    """

    window: float | str | Duration = "20%"
    n: int = 1

    def __post_init__(self) -> None:
        settle(self, window=Duration.parse(self.window, "window"), n=whole("n", self.n, 1))

    def started(self, moment: Moment) -> bool:
        return False  # where a run ends is known once it is resolved

    def due(self, moment: Moment) -> bool:
        return False

    def resolve(self, run: RunLength) -> Schedule:
        if run.steps is None:
            why = run.unknown_since or "set `max_steps`, or `max_epochs` with a loader that has a length"
            raise ValueError(
                f"`window` ends with the run, whose length is not known: {why}. A window that slides needs none, if"
                " it is given in steps, whatever its shape: `Anneal(memory=5)`. Nor does the plain mean from a step on,"
                " a `linear` decay: `Mean` with `EveryNSteps(start=1000)`."
            )
        count = times_within(self.window, self.n, run)
        if count * self.n > run.steps:
            raise ValueError(f"`window` must be at most the run's {run.steps} steps, got {count * self.n}.")
        return EveryNSteps(self.n, start=run.steps - count * self.n)


def times_within(window: float | str | Duration, n: int, run: RunLength) -> int:
    """How often every ``n`` steps is within a window.

    Raises:
        ValueError: If it is never, or a share or epochs are asked of a run of unknown length.
    """
    steps = round(Duration.parse(window, "window").steps(run), 6)
    if steps < n:
        raise ValueError(f"`window` must be at least {n} steps, from one update to the next, got {steps:g}.")
    return int(steps // n)
