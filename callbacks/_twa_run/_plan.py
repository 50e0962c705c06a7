"""When snapshots are taken, and when their coefficients are trained."""

from dataclasses import dataclass
from typing import Any, final

from lightning_merge.callbacks._lightning._run import planned_length
from lightning_merge.schedules import Duration


@final
@dataclass(frozen=True)
class Plan:
    """The two stages of a run, in applied steps.

    Attributes:
        end: Steps of the run.
        stage_start: The step after which the second stage begins.
        snapshots: Snapshots of the whole first stage.
        interval: Steps between snapshots; 0 if they are given.
        first: The step at which the first interval begins.
    """

    end: int
    stage_start: int
    snapshots: int
    interval: int = 0
    first: int = 0

    def is_due(self, step: int) -> bool:
        """Whether a snapshot is taken after this step."""
        elapsed = step - self.first
        return self.interval > 0 and elapsed > 0 and elapsed % self.interval == 0 and step <= self.stage_start

    def refuse_too_short(self, title: str) -> None:
        """Checks that there are two snapshots or more.

        Raises:
            ValueError: If there are not.
        """
        if self.snapshots < 2:
            raise ValueError(
                f"{title} needs two snapshots or more before its second stage: `every` is {self.interval} steps,"
                f" and the stage begins at step {self.stage_start} of {self.end}, {self.stage_start - self.first}"
                " steps after `start`. Lower `every`, `start`, or `stage`."
            )


def plan_of_given(title: str, trainer: Any, snapshots: int) -> Plan:
    """The plan where the snapshots are there before the fit: all of it is the second stage.

    Raises:
        ValueError: If nobody knows how long the run is.
    """
    return Plan(_steps(title, planned_length(trainer)), 0, snapshots)


def plan_of_run(title: str, trainer: Any, every: Duration, stage: Duration, start: Duration | None) -> Plan:
    """The plan of a run that takes its own snapshots.

    Raises:
        ValueError: If nobody knows how long the run is.
    """
    run = planned_length(trainer)
    end = _steps(title, run)
    interval = max(1, round(every.steps(run)))
    first = 0 if start is None else round(start.steps(run))
    stage_start = end - max(1, round(stage.steps(run)))
    return Plan(end, stage_start, (stage_start - first) // interval, interval, first)


def quick_plan(end: int) -> Plan:
    """The plan of a ``fast_dev_run``, in which the real one has no room: two snapshots, and what is left."""
    return Plan(end, stage_start=2, snapshots=2, interval=1)


def _steps(title: str, run: Any) -> int:
    if run.steps is None:
        why = run.unknown_since or "set `max_steps` or `max_epochs`"
        raise ValueError(f"{title} needs a run of known length: {why}.")
    return int(run.steps)
