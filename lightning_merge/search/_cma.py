"""A normal distribution of coefficients that learns its covariance."""

import math
import random
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from lightning_merge._checks import LISTED, number, settle, whole
from lightning_merge.search._method import Method, Proposals
from lightning_merge.search._spaces import Space

_MOST = 1000
"""Coefficients of which the covariance is kept: 8 MB, and a second for its root."""


@final
@dataclass(frozen=True)
class CMAES(Method):
    """``x ~ nearest(mean + size * C^(1/2) z)``; mean, size and covariance ``C`` follow the better half of a population.

    It needs neither a gradient nor smoothness, and finds its way along valleys that are not parallel to any axis. Steps
    that end outside of the space are put to the nearest point of it. With ``search(..., per="tensor")`` there are as
    many dimensions as tasks times tensors: up to a thousand.

    Args:
        size: Standard deviation of the first population; more than 0.
        start: Of all coefficients; ``None``: the uniform mean.
        population: Candidates between two updates; at least 4. ``None``: ``4 + 3 log(dimensions)``, rounded down.

    Raises:
        ValueError: If an argument is out of range, or when the search begins if there are more than 1000 dimensions.

    Example:
        >>> from lightning_merge.search import search
        >>> found = search(lambda a: -(a[0] - 0.3) ** 2 - (a[1] - a[0]) ** 2, 2, CMAES(), space="free", budget=200)
        >>> [round(value, 2) for value in found.coefficients]
        [0.3, 0.3]

    References:
        Hansen, "The CMA evolution strategy: a tutorial", 2016 (arXiv 1604.00772), with negative weights. Akiba et al.,
        "Evolutionary optimization of model merging recipes", 2024, search merges like this.
    """

    endless: ClassVar[bool] = True

    size: float = 0.2
    start: float | None = None
    population: int | None = None

    def __post_init__(self) -> None:
        settle(self, size=number("size", self.size, "(0, inf)"))
        settle(self, start=None if self.start is None else number("start", self.start))
        if self.population is not None:
            settle(self, population=whole("population", self.population, 4, LISTED))

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        here = 1.0 / count if self.start is None else self.start
        mean = space.nearest(space.alike((here,) * count))
        if len(mean) > _MOST:
            raise ValueError(f"`count` and `per` must lead to at most {_MOST} coefficients for CMAES, got {len(mean)}.")
        normal = Normal(mean, self.size, self.population or 4 + int(3 * math.log(len(mean))))
        while True:
            root = normal.root()
            tried, values = [], []
            for _ in range(normal.population):
                far = root @ np.array([rng.gauss(0.0, 1.0) for _ in mean])
                # Without the last digits, which depend on how many threads a root is taken with.
                point = space.nearest([round(float(x), 12) for x in normal.mean + normal.size * far])
                answer = yield point
                tried.append(point)
                values.append(answer.value)
            order = sorted(range(len(tried)), key=lambda index: -values[index])
            normal.follow(np.array([tried[index] for index in order]))


class Normal:
    """The distribution, in the notation of the tutorial's figure 6.

    Args:
        mean: Of the first population.
        size: Its standard deviation.
        population: How many candidates there are between two updates.
    """

    def __init__(self, mean: Any, size: float, population: int) -> None:
        self.mean, self.size, self.population = np.array(mean, dtype=np.float64), size, population
        n = self.n = len(self.mean)
        raw = np.log((population + 1) / 2) - np.log(np.arange(1, population + 1))
        self.half = population // 2
        self.mass = raw[: self.half].sum() ** 2 / (raw[: self.half] ** 2).sum()
        against = raw[self.half :].sum() ** 2 / (raw[self.half :] ** 2).sum()
        self.one = 2 / ((n + 1.3) ** 2 + self.mass)
        self.several = min(1 - self.one - 1e-8, 2 * (self.mass - 2 + 1 / self.mass) / ((n + 2) ** 2 + self.mass))
        least = min(
            1 + self.one / self.several,
            1 + 2 * against / (self.mass + 2),
            (1 - self.one - self.several) / (n * self.several),
        )
        self.weights = np.where(raw >= 0, raw / raw[raw > 0].sum(), least * raw / -raw[raw < 0].sum())
        self.rate = (self.mass + 2) / (n + self.mass + 5)
        self.damping = 1 + 2 * max(0.0, math.sqrt((self.mass - 1) / (n + 1)) - 1) + self.rate
        self.path_rate = (4 + self.mass / n) / (n + 4 + 2 * self.mass / n)
        self.expected = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))
        self.covariance, self.generation = np.eye(n), 0
        self.path, self.size_path = np.zeros(n), np.zeros(n)

    def root(self, power: float = 0.5) -> Any:
        """The symmetric root, which does not depend on the signs and the order of eigenvectors."""
        values, vectors = np.linalg.eigh(self.covariance)
        return (vectors * np.maximum(values, 1e-20) ** power) @ vectors.T

    def follow(self, points: Any) -> None:
        """Moves towards the better half of a population, best first."""
        self.generation += 1
        steps = (points - self.mean) / self.size
        step = self.weights[: self.half] @ steps[: self.half]
        self.mean = self.mean + self.size * step
        inverse = self.root(-0.5)
        kept, gained = 1 - self.rate, math.sqrt(self.rate * (2 - self.rate) * self.mass)
        self.size_path = kept * self.size_path + gained * (inverse @ step)
        length = float(np.linalg.norm(self.size_path))
        self.size *= math.exp(self.rate / self.damping * (length / self.expected - 1))
        stalled = (
            length / math.sqrt(1 - kept ** (2 * (self.generation + 1))) >= (1.4 + 2 / (self.n + 1)) * self.expected
        )
        slow = self.path_rate * (2 - self.path_rate)
        self.path = (1 - self.path_rate) * self.path + (0.0 if stalled else math.sqrt(slow * self.mass)) * step
        far = np.linalg.norm(inverse @ steps.T, axis=0) ** 2
        weights = self.weights * np.where(self.weights >= 0, 1.0, self.n / (far + 1e-8))
        left = 1 - self.one - self.several * self.weights.sum() + (self.one * slow if stalled else 0.0)
        spread = self.one * np.outer(self.path, self.path) + self.several * (steps.T * weights) @ steps
        self.covariance = left * self.covariance + spread
        self.covariance = (self.covariance + self.covariance.T) / 2
