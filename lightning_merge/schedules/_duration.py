"""The lengths that "when" can be said in."""

import math
from dataclasses import dataclass
from typing import Literal, final

from lightning_merge._checks import number, one_of, real, settle
from lightning_merge.schedules._moment import RunLength


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
        """The same length in applied optimizer steps of this run.

        Args:
            run: How long the run is, as far as that is known.
        """
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


_READS = "read like '500 steps', '2 epochs' or '5%'"


def _of_steps(argument: str, given: object, value: float) -> float:
    """A bare number, which counts steps: below 1 it was meant as a share of the run."""
    if value < 1:
        raise ValueError(
            f"`{argument}` counts optimizer steps if it is a number, at least 1, got {given!r}. For a share of the run"
            f" write '{value * 100:g}%'."
        )
    return float(value)
