"""A population of coefficients that cross and mutate."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, final

from lightning_merge._checks import LISTED, number, settle, whole
from lightning_merge.search._method import Method, Proposals
from lightning_merge.search._spaces import Coefficients, Space, one_hot


@final
@dataclass(frozen=True)
class Evolutionary(Method):
    """Each child is a random point between two parents, plus noise. If it is no worse than the worst, it replaces that.

    The population starts as the uniform mean, the ingredients, and random coefficients. The noise grows by half after a
    child that is the best so far, and shrinks by a tenth otherwise. It needs neither a gradient nor smoothness; with
    many ingredients it takes a few hundred evaluations.

    Args:
        population: Coefficients that are kept; at least 2, at most a million.
        noise: Standard deviation of the first mutations; more than 0.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from lightning_merge.search import search
        >>> found = search(lambda a: -(a[1] - 0.3) ** 2, 2, Evolutionary(population=4), budget=60)
        >>> round(found.coefficients[1], 2)
        0.3

    References:
        Liu et al., "Linear combination of saved checkpoints makes consistency and diffusion models better" (LCSC), ICLR
        2025, searches like this; its code was not released, so the settings are ours.
    """

    endless: ClassVar[bool] = True

    population: int = 16
    noise: float = 0.2

    def __post_init__(self) -> None:
        settle(self, population=whole("population", self.population, 2, LISTED))
        settle(self, noise=number("noise", self.noise, "(0, inf)"))

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        pool: list[tuple[float, Coefficients]] = []
        for start in self._starts(space, count, rng):
            answer = yield start
            pool.append((answer.value, start))
        noise = self.noise
        while True:
            pool.sort(key=lambda member: -member[0])
            mother, father = (pool[min(rng.randrange(len(pool)), rng.randrange(len(pool)))][1] for _ in range(2))
            blend = rng.random()
            child = space.nearest(
                [blend * a + (1.0 - blend) * b + rng.gauss(0.0, noise) for a, b in zip(mother, father, strict=True)]
            )
            answer = yield child
            noise *= 1.5 if answer.value > pool[0][0] else 0.9
            noise = min(max(noise, 1e-3 * self.noise), self.noise)
            if answer.value >= pool[-1][0]:
                pool[-1] = (answer.value, child)

    def _starts(self, space: Space, count: int, rng: random.Random) -> Iterator[Coefficients]:
        """One at a time: the budget may be spent before there are as many as the population."""
        known = [(1.0 / count,) * count, *(one_hot(count, index) for index in range(count))]
        yield from map(space.alike, known[: self.population])
        for _ in range(self.population - len(known)):
            yield space.from_unit([rng.random() for _ in range(space.dimensions(count))])
