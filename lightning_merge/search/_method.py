"""What a search method is."""

import random
from abc import ABC, abstractmethod
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from lightning_merge._checks import number, numbers, settle
from lightning_merge.search._spaces import Coefficients, Space


@dataclass(frozen=True)
class Answer:
    """What a method is told about a candidate: higher is better.

    Args:
        value: The score, negated if the lowest is sought; minus infinity for a rejected candidate, and only for one.
        gradient: Derivatives of ``value`` by each coefficient, if the score gives them.
        parts: The scores of several tasks, higher is better, if the score gives them.
    """

    value: float
    gradient: Coefficients | None = None
    parts: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        settle(self, value=number("value", self.value, "[-inf, inf]", "a number"))
        if self.gradient is not None:
            settle(self, gradient=numbers("gradient", self.gradient, "[-inf, inf]"))
        if self.parts is not None:
            settle(self, parts=numbers("parts", self.parts))


Proposals: TypeAlias = Generator[Coefficients, Answer, None]
"""Yields a candidate, is sent the answer."""


class Method(ABC):
    """How a search chooses its candidates: a frozen dataclass of settings.

    The same answers lead to the same candidates, which is how a search continues from its log.
    """

    endless: ClassVar[bool] = False
    """Whether it goes on until the budget is spent."""

    takes_last: ClassVar[bool] = False
    """Whether the last candidate is what it found, since scores of different batches do not tell which is best."""

    @abstractmethod
    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        """The candidates for ``count`` ingredients, one by one.

        Args:
            space: The coefficients that are allowed.
            count: Number of ingredients; at least 1.
            rng: Where random numbers come from; saved with the search.
        """
