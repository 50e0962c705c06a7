"""Schedules: when weights are merged. And the lengths that "when" can be said in."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Self, final

from lightning_merge._checks import instance, number, one_of, real, settle, start, whole


@final
@dataclass(frozen=True)
class Moment:
    """A point of a run, seen right after an optimizer step or at the end of an epoch.

    Args:
        step: Optimizer steps applied so far (not batches, not steps that a gradient scaler skipped).
        epoch: Epochs completed so far.
        epoch_end: Whether an epoch has just been completed; else a step has just been applied.
    """

    step: int
    epoch: int
    epoch_end: bool = False


@final
@dataclass(frozen=True)
class RunLength:
    """How long a run will be, as far as it is known: ``None`` where it is not.

    Args:
        steps: Optimizer steps of the whole run.
        epochs: Epochs of the whole run.
        steps_per_epoch: Optimizer steps of one epoch.
        unknown_since: Why steps are not known, where the Trainer's settings are not the reason; for messages.

    Raises:
        TypeError: If one of them is not a whole number.
        ValueError: If one of them is negative.
    """

    steps: int | None = None
    epochs: int | None = None
    steps_per_epoch: int | None = None
    unknown_since: str = ""

    def __post_init__(self) -> None:
        for field in ("steps", "epochs", "steps_per_epoch"):
            value = getattr(self, field)
            settle(self, **{field: None if value is None else whole(field, value, 0)})
        instance("unknown_since", self.unknown_since, str, "a text")


class Schedule(ABC):
    """When a rule starts and when it takes the weights in. A frozen dataclass; two questions about a ``Moment``."""

    @abstractmethod
    def started(self, moment: Moment) -> bool:
        """Whether the average exists from this moment on."""

    @abstractmethod
    def due(self, moment: Moment) -> bool:
        """Whether the weights are taken in at this moment."""

    @abstractmethod
    def resolve(self, run: RunLength) -> "Schedule":
        """This schedule with a start that was given as a share of the run turned into steps or epochs."""


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
class FromStart(Schedule):
    """As another schedule, but the rule starts with the weights that the run begins with.

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


@final
@dataclass(frozen=True)
class Duration:
    """A length of training: ``Duration(500)``, ``Duration(2, "epochs")``, ``Duration(0.05, "run")``.

    Args:
        value: How many; more than 0.
        unit: Applied optimizer ``steps``, ``epochs``, or shares of the ``run`` (at most 1).

    Raises:
        ValueError: If ``value`` or ``unit`` is out of range, or at ``steps`` if the run's length is not known.

    Example:
        >>> Duration.parse("2 epochs")
        Duration(value=2.0, unit='epochs')
        >>> Duration.parse("5%").steps(RunLength(steps=1000))
        50.0
    """

    value: float
    unit: Literal["steps", "epochs", "run"] = "steps"

    def __post_init__(self) -> None:
        one_of("unit", self.unit, ("steps", "epochs", "run"))
        settle(self, value=number("value", self.value, "(0, 1]" if self.unit == "run" else "(0, inf)"))

    @classmethod
    def parse(cls, text: "str | float | Duration", argument: str = "text") -> "Duration":
        """A duration from ``500``, ``"500 steps"``, ``"2 epochs"`` or ``"5%"``.

        Args:
            text: What was given. A number counts steps, so it is at least 1.
            argument: What to call it in messages.

        Raises:
            TypeError: If it is neither text nor number.
            ValueError: If it reads like none of these, or is out of range.
        """
        if isinstance(text, Duration):
            return text
        if not isinstance(text, str):
            given = real(argument, text, f"a number of steps, or {_READS}")
            return cls(_of_steps(argument, text, number(argument, given, "(0, inf)")))
        amount, _, unit = text.strip().partition(" ")
        unit = unit.strip()
        try:
            if amount.endswith("%") and not unit:
                return cls(float(amount[:-1]) / 100, "run")
            if unit in ("step", "steps"):
                return cls(float(amount))
            if unit in ("epoch", "epochs"):
                return cls(float(amount), "epochs")
            value = float(amount) if not unit else math.nan
        except ValueError as error:
            raise ValueError(f"`{argument}`: a duration must {_READS}, got {text!r}: {error}") from None
        if not 0 < value < math.inf:
            raise ValueError(f"`{argument}`: a duration must {_READS}, got {text!r}.")
        return cls(_of_steps(argument, text, value))

    def steps(self, run: RunLength) -> float:
        """The same length in applied optimizer steps of this run."""
        if self.unit == "steps":
            return self.value
        scale = run.steps_per_epoch if self.unit == "epochs" else run.steps
        if scale is None:
            raise ValueError(
                f"a duration of {self.value:g} {self.unit} needs a run of known length:"
                f" {run.unknown_since or 'set `max_steps`, or `max_epochs` with a loader that has a length'}, or give"
                " the duration in steps."
            )
        return self.value * scale


def anneal(
    base: float, target: float, elapsed: float, length: float, strategy: Literal["cos", "linear"] = "cos"
) -> float:
    """Value on the way from ``base`` to ``target`` after ``elapsed`` of ``length`` (any unit; 0: at once).

    ``base + (target - base) * a`` with ``a = s`` (linear) or ``(1 - cos(pi s)) / 2``, ``s = min(1, elapsed / length)``.
    The closed form of ``torch.optim.swa_utils.SWALR``, so it does not depend on what others write to the optimizer.

    Raises:
        TypeError: If an argument is not a number.
        ValueError: If ``strategy`` is neither.

    Example:
        >>> [round(anneal(0.1, 0.02, epoch, 4, "linear"), 6) for epoch in range(6)]
        [0.1, 0.08, 0.06, 0.04, 0.02, 0.02]
    """
    base, target, elapsed, length = (
        number(name, value)
        for name, value in (("base", base), ("target", target), ("elapsed", elapsed), ("length", length))
    )
    one_of("strategy", strategy, ("cos", "linear"))
    share = 1.0 if length <= 0 else min(1.0, elapsed / length)
    if strategy == "cos":
        share = (1 - math.cos(math.pi * share)) / 2
    return target * share + base * (1 - share)


_READS = "read like '500 steps', '2 epochs' or '5%'"


def _of_steps(argument: str, given: object, value: float) -> float:
    """A bare number, which counts steps: below 1 it was meant as a share of the run."""
    if value < 1:
        raise ValueError(
            f"`{argument}` counts optimizer steps if it is a number, at least 1, got {given!r}. For a share of the run"
            f" write '{value * 100:g}%'."
        )
    return float(value)


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
