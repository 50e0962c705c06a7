"""One validation run, and the few questions about what it writes."""

from dataclasses import dataclass
from typing import Any

from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._ledger import RAW


@dataclass
class Pass:
    """One validation run: the weights it measures (``None``: raw) and the prefixes its metrics are logged under."""

    average: Average | None
    prefixes: list[str]

    @property
    def holds(self) -> str:
        """The name of the set that it measures."""
        return RAW if self.average is None else self.average.name

    def unmeasured(self, error: Exception) -> str:
        """What is said of final weights whose validation failed."""
        whose = "The raw weights" if self.average is None else f"{self.average.title}: its final weights"
        said = f"{whose} could not be measured, since {type(error).__name__} was raised: {error}."
        if self.average is not None:
            said += " They are published unmeasured; `final_validation=False` leaves the pass out."
        return said


def is_number(value: Any) -> bool:
    """Whether an entry of ``callback_metrics`` is one number; what is put there by hand may be anything."""
    try:
        float(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def some(names: list[str], most: int = 5) -> str:
    """The first names, for messages."""
    return ", ".join(f"`{name}`" for name in names[:most]) + (", ..." if len(names) > most else "")


def decides(callback: Any) -> bool:
    """Whether a callback saves or stops by a metric."""
    return bool({"Checkpoint", "EarlyStopping"} & {cls.__name__ for cls in type(callback).__mro__})
