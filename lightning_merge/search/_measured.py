"""What a score may say of a candidate beside one number."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import final

from lightning_merge._checks import number, numbers, settle
from lightning_merge.search._spaces import Coefficients


@final
@dataclass(frozen=True)
class Measured:
    """A score with what methods make use of.

    Args:
        value: The score itself; a NaN, or an infinity that is bad, rejects the candidate. With either of them the
            others are left out.
        gradient: Its derivatives by each coefficient, for ``Gradient`` and ``Adam``.
        parts: The scores of several tasks, for ``MAP``, equally many for each candidate; the better, the same way as
            ``value``.

    Raises:
        TypeError: If an argument is no number, or no sequence of numbers.
        ValueError: If a derivative or a part is not finite.

    Example:
        >>> Measured(0.7, parts=(0.9, 0.5))
        Measured(value=0.7, gradient=None, parts=(0.9, 0.5))
    """

    value: float
    gradient: Coefficients | None = None
    parts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        value = float(self.value) if self.value != self.value else number("value", self.value, "[-inf, inf]")
        settle(self, value=value)
        told = math.isfinite(value)  # of others there is no slope, and no part means anything
        settle(self, gradient=numbers("gradient", self.gradient) if told and self.gradient is not None else None)
        settle(self, parts=numbers("parts", self.parts) if told and self.parts is not None else None)


class Objective(ABC):
    """A score that is told which evaluation of a search this is, so that each may have batches of its own.

    The same coefficients and number lead to the same score, which is how a search continues from its log.
    """

    @property
    @abstractmethod
    def subject(self) -> str:
        """What it measures on, as a hash: the log of a search on other data is refused."""

    @abstractmethod
    def measure(self, coefficients: Coefficients, number: int) -> Measured:
        """The score.

        Args:
            coefficients: All of a search.
            number: How many evaluations there were before, those of the log included.
        """
