"""Quadratic models of the tasks' scores, and the trade-offs that they predict."""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np

from lightning_merge._checks import LISTED, one_of, settle, whole
from lightning_merge._choice import Mode
from lightning_merge.search._found import Evaluation, Found
from lightning_merge.search._method import Method, Proposals
from lightning_merge.search._spaces import Coefficients, Space, one_hot
from lightning_merge.soups import pareto_front

_MOST, _POOL, _STEPS = 100, 2000, 200


@final
@dataclass(frozen=True)
class MAP(Method):
    """Fits ``score of task t ~ a' A_t a + b_t' a + c_t`` to ``samples`` candidates, then tries what these predict.

    The score gives one number for each task, ``Measured(mean, parts=(...))``; without ``parts`` there is one task.
    After the uniform mean, the ingredients and random coefficients, least squares give the quadratics; for ``points``
    preferences, evenly spread and equal ones first, it proposes the coefficients with the best weighted sum of
    predicted scores. These are scored in truth, and ``pareto_set`` gives the candidates that no other beats in all
    tasks.

    Args:
        samples: Candidates that the quadratics are fitted to; at least 3. Of ``n`` coefficients they have ``(n + 1) (n
            + 2) / 2`` terms; with fewer samples than that the smallest terms that fit.
        points: Trade-offs to try; at least 1.

    Raises:
        ValueError: If an argument is out of range, or when the search begins if there are more than 100 coefficients.

    Example:
        >>> from lightning_merge.search import Measured, search
        >>> def score(a):
        ...     parts = (-((a[0] - 1) ** 2) - a[1] ** 2, -(a[0] ** 2) - (a[1] - 1) ** 2)
        ...     return Measured(sum(parts) / 2, parts=parts)
        >>> found = search(score, 2, MAP(samples=10, points=3), space="free")
        >>> [round(value, 3) for value in found.coefficients], len(pareto_set(found))
        ([0.5, 0.5], 5)

    References:
        Li et al., "MAP: low-compute model merging with amortized Pareto fronts via quadratic approximation", ICLR 2025.
        Its code passes the quadratic through a sigmoid or a softplus, and searches the fits with NSGA-III.
    """

    samples: int = 30
    points: int = 10

    def __post_init__(self) -> None:
        settle(self, samples=whole("samples", self.samples, 3, LISTED), points=whole("points", self.points, 1, LISTED))

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        known: dict[Coefficients, tuple[float, ...]] = {}
        for start in self._starts(space, count, rng):
            answer = yield start
            if math.isfinite(answer.value):
                known[start] = answer.parts or (answer.value,)
        if not known:
            return
        if len({len(parts) for parts in known.values()}) > 1:
            raise ValueError("`parts` of a score must be equally many for each candidate.")
        places = np.array(list(known))
        models = fitted(places, np.array(list(known.values())))
        pool = [*known, *_random(space, count, rng, _POOL)]
        for preference in preferences(models.shape[1], self.points):
            yield _best(space, pool, models @ np.array(preference))

    def _starts(self, space: Space, count: int, rng: random.Random) -> Iterator[Coefficients]:
        alone = [space.alike(one_hot(count, index)) for index in range(count)]
        if len(alone[0]) > _MOST:
            raise ValueError(
                f"`count` and `per` must lead to at most {_MOST} coefficients for MAP, got {len(alone[0])}."
            )
        starts = list(dict.fromkeys([space.alike((1.0 / count,) * count), *alone]))[: self.samples]
        yield from starts
        yield from _random(space, count, rng, self.samples - len(starts))


def pareto_set(found: Found, mode: Mode = "max") -> list[Evaluation]:
    """The candidates of a search that no other one beats: as good in all ``parts``, and better in one.

    Args:
        found: What ``search`` gave; candidates without ``parts`` are beaten by any with a better score.
        mode: That of the search.

    Raises:
        TypeError: If ``found`` is something else.
        ValueError: If ``mode`` is not ``"max"`` or ``"min"``, or the candidates have differently many parts.
    """
    if not isinstance(found, Found):
        raise TypeError(f"`found` must be what `search` gave, got {found!r}.")
    sign = 1.0 if one_of("mode", mode, ("max", "min")) == "max" else -1.0
    scored = [(each, each.parts or (each.score,)) for each in found.history if each.score is not None]
    return [scored[i][0] for i in pareto_front([[sign * part for part in parts] for _, parts in scored])]


def terms(places: Any) -> Any:
    """Squares, products of two, coefficients, and one: a row for each candidate."""
    count = places.shape[1]
    products = [places[:, i] * places[:, j] for i in range(count) for j in range(i + 1, count)]
    return np.stack([*(places**2).T, *products, *places.T, np.ones(len(places))], axis=1)


def fitted(places: Any, scores: Any) -> Any:
    """The factors of the terms by least squares, a column for each task; the smallest ones if several fit."""
    return np.linalg.lstsq(terms(places), scores, rcond=None)[0]


def preferences(tasks: int, points: int) -> list[tuple[float, ...]]:
    """So many weights of the tasks' scores: equal ones, each task alone, and others between."""
    rng = random.Random(0)
    found = [(1.0 / tasks,) * tasks, *(one_hot(tasks, task) for task in range(tasks))]
    while len(found) < points:
        drawn = [rng.expovariate(1.0) for _ in range(tasks)]
        found.append(tuple(each / sum(drawn) for each in drawn))
    return list(dict.fromkeys(found))[:points]


def _random(space: Space, count: int, rng: random.Random, many: int) -> Iterator[Coefficients]:
    for _ in range(many):
        yield space.from_unit([rng.random() for _ in range(space.dimensions(count))])


def _best(space: Space, pool: Sequence[Coefficients], model: Any) -> Coefficients:
    """The coefficients that a quadratic takes for the best: from the best of the pool uphill, within the space."""
    here = pool[int(np.argmax(terms(np.array(pool)) @ model))]
    count = len(here)
    curve = np.zeros((count, count))
    curve[np.triu_indices(count, 1)] = model[count : count * (count + 1) // 2]
    curve = curve + curve.T + 2 * np.diag(model[:count])
    slope = model[-count - 1 : -1]
    rate = 1.0 / max(1e-3, float(np.abs(np.linalg.eigvalsh(curve)).max()))
    for _ in range(_STEPS):
        here = space.nearest([float(x) for x in np.array(here) + rate * (curve @ np.array(here) + slope)])
    return space.nearest([round(value, 9) for value in here])
