"""Uphill by the gradient of the score."""

import math
import random
from collections.abc import Generator
from dataclasses import dataclass
from typing import ClassVar, TypeAlias, final

from lightning_merge._checks import number, settle
from lightning_merge.search._method import Answer, Method, Proposals
from lightning_merge.search._spaces import Coefficients, Space, one_hot

_Measuring: TypeAlias = Generator[Coefficients, Answer, Coefficients]
_Starting: TypeAlias = Generator[Coefficients, Answer, tuple[Coefficients, Answer]]


@final
@dataclass(frozen=True)
class Gradient(Method):
    """``a <- nearest(a + rate * gradient / |gradient|)`` from the uniform mean on, with a rate that finds itself.

    If the uniform mean is rejected it starts from the best ingredient.

    The rate halves whenever that is no better, and grows by half after each success. A score that returns its gradient
    too, ``(score, [derivative by each coefficient])``, is evaluated once a step. Otherwise the gradient is measured by
    ``count`` more evaluations of small moves, so the score has to be smooth: a loss, not an accuracy.

    Args:
        rate: Length of the first step; more than 0.
        difference: Length of the small moves, in (0, 1).

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_merge.search import search
        >>> found = search(lambda a: (-(a[1] - 0.3) ** 2, [0.0, -2 * (a[1] - 0.3)]), 2, Gradient(), budget=40)
        >>> round(found.coefficients[1], 4)
        0.3
    """

    endless: ClassVar[bool] = True

    rate: float = 0.1
    difference: float = 1e-2

    def __post_init__(self) -> None:
        settle(self, rate=number("rate", self.rate, "(0, inf)"))
        settle(self, difference=number("difference", self.difference, "(0, 1)"))

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        here = space.alike((1.0 / count,) * count)
        rate = self.rate
        best = yield here
        if best.value == -math.inf:  # no slope leads away from there
            here, best = yield from _best_ingredient(space, count, here, best)
        while rate > 1e-9 and math.isfinite(best.value):
            slope = best.gradient or (yield from self._measure(space, here, best.value, min(self.difference, rate)))
            # Along the space: what a small move by the gradient leaves of it.
            small = 1e-3 / max(1e-30, max(map(abs, slope)))
            moved = space.nearest([a + small * g for a, g in zip(here, slope, strict=True)])
            direction = [(b - a) / small for a, b in zip(here, moved, strict=True)]
            length = math.hypot(*direction)
            if length <= 1e-12 * max(1e-30, max(map(abs, slope))):
                return
            while rate > 1e-9:
                there = space.nearest([a + rate * d / length for a, d in zip(here, direction, strict=True)])
                answer = yield there
                if answer.value > best.value:
                    here, best, rate = there, answer, 1.5 * rate
                    break
                rate /= 2

    def _measure(self, space: Space, here: Coefficients, value: float, size: float) -> _Measuring:
        """Differences of the score over small moves.

        Where coefficients sum to one, the moves lead towards each ingredient. Their slopes are the gradient up to a
        constant, which points out of the space.
        """
        slopes = []
        for index in range(len(here)):
            step = size if space.contains(space.moved(here, index, size)) else -size
            answer = yield space.moved(here, index, step)
            slopes.append((answer.value - value) / step if math.isfinite(answer.value) else 0.0)
        return tuple(slopes)


def _best_ingredient(space: Space, count: int, here: Coefficients, best: Answer) -> _Starting:
    """The ingredient with the best score, and its answer; what there is if all are rejected."""
    for index in range(count):
        there = space.alike(one_hot(count, index))
        answer = yield there
        if answer.value > best.value:
            here, best = there, answer
    return here, best
