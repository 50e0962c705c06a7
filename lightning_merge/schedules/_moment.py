"""A point of a run, its length, and the two questions that a schedule answers about them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from lightning_merge._checks import instance, settle, whole


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
        """Whether the average exists from this moment on.

        Args:
            moment: Steps and epochs that have been completed.
        """

    @abstractmethod
    def due(self, moment: Moment) -> bool:
        """Whether the weights are taken in at this moment.

        Args:
            moment: Steps and epochs that have been completed.
        """

    @abstractmethod
    def resolve(self, run: RunLength) -> "Schedule":
        """This schedule with a start that was given as a share of the run turned into steps or epochs.

        Args:
            run: How long the run is, as far as that is known.
        """
