"""One line after the other: from what there is towards each next ingredient."""

import math
import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import final

from lightning_merge._checks import LISTED, number, settle, whole
from lightning_merge.search._method import Answer, Method, Proposals
from lightning_merge.search._spaces import Coefficients, Space, one_hot

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


@final
@dataclass(frozen=True)
class Line(Method):
    """``merged <- (1 - t) * merged + t * next``, with the best ``t`` in [``low``, ``high``] by golden section.

    It begins with the first ingredient and takes the others in their order, so two ingredients are one line: ``t`` is
    the share of the second. Golden section finds the one maximum of a score that rises and falls; of several, one.

    Args:
        low: Least ``t``; in [0, 1) for weighted means, less than 0 to extrapolate backwards.
        high: Largest ``t``; more than ``low``, at most 1 for weighted means.
        evaluations: Per line; at least 3. Of ``k``, the last is within ``0.618 ** (k - 3)`` of the length.

    Raises:
        ValueError: If an argument is out of range, or when the search begins if the space does not hold the ends.

    Example:
        >>> from lightning_merge.search import search
        >>> found = search(lambda a: -(a[1] - 0.83) ** 2, 2, Line(low=0.5))
        >>> [round(value, 2) for value in found.coefficients]
        [0.17, 0.83]

    References:
        Kiefer, "Sequential minimax search for a maximum", 1953 (golden section).
    """

    low: float = 0.0
    high: float = 1.0
    evaluations: int = 12

    def __post_init__(self) -> None:
        settle(self, low=number("low", self.low), high=number("high", self.high))
        if not self.low < self.high:
            raise ValueError(f"`low` must be less than `high`, got {self.low} and {self.high}.")
        settle(self, evaluations=whole("evaluations", self.evaluations, 3, LISTED))

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        merged = space.alike(one_hot(count, 0))
        for index in range(1, count):
            merged = yield from self._one_line(space, merged, space.alike(one_hot(count, index)))

    def _one_line(
        self, space: Space, start: Coefficients, end: Coefficients
    ) -> Generator[Coefficients, Answer, Coefficients]:
        def at(t: float) -> Coefficients:
            return tuple((1.0 - t) * a + t * b for a, b in zip(start, end, strict=True))

        for t in (self.low, self.high):
            if not space.contains(at(t)):
                raise ValueError(f"`low` and `high` must lead to coefficients of {space!r}, got t={t}, so {at(t)}.")
        tried: dict[float, float] = {}
        low, high = self.low, self.high
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        for t in (low, high, left, right)[: self.evaluations]:
            tried[t] = (yield at(t)).value
        while len(tried) < self.evaluations:
            if tried[left] >= tried[right]:
                high, right = right, left
                left = t = high - _GOLDEN * (high - low)
            else:
                low, left = left, right
                right = t = low + _GOLDEN * (high - low)
            if t in tried:
                break  # the interval is as small as numbers can tell
            tried[t] = (yield at(t)).value
        return at(max(tried, key=lambda t: tried[t]))
