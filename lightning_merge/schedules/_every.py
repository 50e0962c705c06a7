"""Every so many steps or epochs, from a start."""

import math
from dataclasses import dataclass, replace
from typing import Self, final

from lightning_merge._checks import instance, settle, start, whole
from lightning_merge.schedules._moment import Moment, RunLength, Schedule


@final
@dataclass(frozen=True)
class EveryNSteps(Schedule):
    """After applied step ``start`` and every ``n`` steps from there: ``start + n``, ``start + 2n``, ...

    Args:
        n: Applied optimizer steps between updates; at least 1.
        start: Applied step after which the average starts as a copy of the weights; at least 0 (0: before training).
            A float in [0, 1) is a share of the run's steps, rounded up.

    Raises:
        ValueError: If ``n`` or ``start`` is out of range, or at ``resolve`` if a share is asked of a run of unknown
            length.

    Example:
        >>> schedule = EveryNSteps(n=2, start=1)
        >>> [step for step in range(8) if schedule.due(Moment(step, epoch=0))]
        [3, 5, 7]
    """

    n: int = 1
    start: int | float = 0

    def __post_init__(self) -> None:
        settle(self, n=whole("n", self.n, 1), start=start("start", self.start))

    def started(self, moment: Moment) -> bool:
        return moment.step >= self.start

    def due(self, moment: Moment) -> bool:
        steps = moment.step - self.start
        return not moment.epoch_end and steps > 0 and steps % self.n == 0

    def resolve(self, run: RunLength) -> Self:
        return replace(self, start=_resolve_start(self.start, run.steps, "steps", run.unknown_since))


@final
@dataclass(frozen=True)
class LocalSteps(Schedule):
    """After every step up to ``start``, then after every ``n`` steps: ``1, 2, ..., start, start + n, start + 2n, ...``

    For branches: they train as one up to ``start``, since plain SGD on the mean gradient is the mean of SGD steps, and
    apart from then on.

    Args:
        n: Steps between merges after the start; at least 1.
        start: Steps that are merged each; at least 0. A float in [0, 1) is a share of the run's steps, rounded up.

    Raises:
        ValueError: If ``n`` or ``start`` is out of range, or at ``resolve`` if a share is asked of a run of unknown
            length.

    Example:
        >>> schedule = LocalSteps(n=3, start=2)
        >>> [step for step in range(10) if schedule.due(Moment(step, epoch=0))]
        [1, 2, 5, 8]
    """

    n: int = 1
    start: int | float = 0

    def __post_init__(self) -> None:
        settle(self, n=whole("n", self.n, 1), start=start("start", self.start))

    def started(self, moment: Moment) -> bool:
        return True

    def due(self, moment: Moment) -> bool:
        steps = moment.step - self.start
        return not moment.epoch_end and moment.step > 0 and (steps <= 0 or steps % self.n == 0)

    def resolve(self, run: RunLength) -> Self:
        return replace(self, start=_resolve_start(self.start, run.steps, "steps", run.unknown_since))


@final
@dataclass(frozen=True)
class EveryNEpochs(Schedule):
    """At the end of an epoch, before it is validated: once ``start`` epochs are complete, then every ``n`` epochs.

    Args:
        n: Epochs between updates; at least 1.
        start: Completed epochs at which the first weights are taken in; at least 0 (0 and 1 both mean the end of the
            first epoch). A float in [0, 1) is a share of the run's epochs, rounded up.

    Raises:
        ValueError: If ``n`` or ``start`` is out of range, or at ``resolve`` if a share is asked of a run of unknown
            length.

    Example:
        >>> schedule = EveryNEpochs(n=2, start=3)
        >>> [epoch for epoch in range(9) if schedule.due(Moment(0, epoch, epoch_end=True))]
        [3, 5, 7]

    References:
        Collection rule of the authors' SWA code: epoch index e is collected if e + 1 >= start and n divides
        e + 1 - start.
    """

    n: int = 1
    start: int | float = 0

    def __post_init__(self) -> None:
        settle(self, n=whole("n", self.n, 1), start=start("start", self.start))

    def started(self, moment: Moment) -> bool:
        return moment.epoch >= max(self.start, 1)

    def due(self, moment: Moment) -> bool:
        first = max(self.start, 1)
        return moment.epoch_end and moment.epoch >= first and (moment.epoch - first) % self.n == 0

    def resolve(self, run: RunLength) -> Self:
        return replace(self, start=_resolve_start(self.start, run.epochs, "epochs"))


@final
@dataclass(frozen=True)
class AtValidations(Schedule):
    """Never at a step or an epoch's end: for a rule that is handed the weights of each validation with their score.

    Args:
        start: Applied step from which on validations count; at least 0. A float in [0, 1) is a share of the run's
            steps, rounded up.

    Raises:
        ValueError: If ``start`` is out of range, or at ``resolve`` if a share is asked of a run of unknown length.

    Example:
        >>> AtValidations().started(Moment(0, epoch=0)), AtValidations().due(Moment(9, epoch=0))
        (True, False)
    """

    start: int | float = 0

    def __post_init__(self) -> None:
        settle(self, start=start("start", self.start))

    def started(self, moment: Moment) -> bool:
        return moment.step >= self.start

    def due(self, moment: Moment) -> bool:
        return False

    def resolve(self, run: RunLength) -> Self:
        return replace(self, start=_resolve_start(self.start, run.steps, "steps", run.unknown_since))


@final
@dataclass(frozen=True)
class FromStart(Schedule):
    """As another schedule, but the rule starts with the weights that the run begins with.

    Args:
        schedule: When weights are taken in after the start.

    Example:
        >>> schedule = FromStart(EveryNEpochs())
        >>> schedule.started(Moment(0, 0)), schedule.due(Moment(0, 0)), schedule.due(Moment(9, 1, epoch_end=True))
        (True, False, True)
    """

    schedule: Schedule

    def __post_init__(self) -> None:
        instance("schedule", self.schedule, Schedule)

    def started(self, moment: Moment) -> bool:
        return True

    def due(self, moment: Moment) -> bool:
        return self.schedule.due(moment)

    def resolve(self, run: RunLength) -> Self:
        return replace(self, schedule=self.schedule.resolve(run))


def _resolve_start(start: int | float, length: int | None, unit: str, unknown_since: str = "") -> int:
    if isinstance(start, int):
        return start
    if start == 0:
        return 0
    if length is None:
        raise ValueError(
            f"`start={start}` is a share of the run, but the number of {unit} is not known:"
            f" {unknown_since or 'set `max_steps` or `max_epochs` (and a loader that has a length)'}, or give the start"
            f" as a whole number of {unit}."
        )
    return math.ceil(round(start * length, 9))
