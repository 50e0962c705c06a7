"""Downhill by Adam, on batches that change."""

import math
import random
from dataclasses import dataclass
from typing import ClassVar, final

from lightning_merge._checks import number, settle
from lightning_merge.search._method import Method, Proposals
from lightning_merge.search._spaces import Space

_FIRST, _SECOND, _FLOOR = 0.9, 0.999, 1e-8


@final
@dataclass(frozen=True)
class Adam(Method):
    """``a <- nearest(a + rate * m / (sqrt(v) + 1e-8))`` with torch's means ``m`` and ``v`` of gradients and squares.

    The score has to give its gradient, as the objectives of ``lightning_merge.search`` do, and may be measured on other
    batches each time: what is found is the last candidate that was scored. Steps end within the space, and gradients
    are taken there. A bound that is applied in the forward pass instead, as in the published AdaMerging, has gradient 0
    beyond it, so that a coefficient that left never comes back.

    Args:
        rate: About the length of the first steps in each coefficient; more than 0.
        start: Of all coefficients: 0.3 in AdaMerging, 0 in aTLAS.

    Raises:
        ValueError: If an argument is out of range, or when the search begins if the score gives no gradient.

    Example:
        >>> from lightning_merge.search import search
        >>> score = lambda a: ((a[0] - 0.5) ** 2, [2 * (a[0] - 0.5)])
        >>> found = search(score, 1, Adam(0.05), space="free", mode="min", budget=200)
        >>> round(found.coefficients[0], 3)
        0.5

    References:
        Kingma and Ba, "Adam: a method for stochastic optimization", ICLR 2015, algorithm 1.
    """

    endless: ClassVar[bool] = True
    takes_last: ClassVar[bool] = True

    rate: float = 1e-3
    start: float = 0.3

    def __post_init__(self) -> None:
        settle(self, rate=number("rate", self.rate, "(0, inf)"), start=number("start", self.start))

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        here = space.nearest(space.alike((self.start,) * count))
        mean, square = [0.0] * len(here), [0.0] * len(here)
        step = 0
        while True:
            answer = yield here
            if answer.value == -math.inf:
                return  # no slope leads away from there
            if answer.gradient is None:
                raise ValueError("`score` must give its gradient to Adam: `(score, [derivative by each coefficient])`.")
            step += 1
            mean = [m + (1.0 - _FIRST) * (g - m) for m, g in zip(mean, answer.gradient, strict=True)]
            square = [_SECOND * v + (1.0 - _SECOND) * g * g for v, g in zip(square, answer.gradient, strict=True)]
            length, wide = self.rate / (1.0 - _FIRST**step), math.sqrt(1.0 - _SECOND**step)
            here = space.nearest(
                [a + length * m / (math.sqrt(v) / wide + _FLOOR) for a, m, v in zip(here, mean, square, strict=True)]
            )
