"""Every combination of evenly spaced coefficients."""

import random
from dataclasses import dataclass
from itertools import islice
from typing import final

from lightning_merge._checks import number, settle
from lightning_merge.search._method import Method, Proposals
from lightning_merge.search._spaces import Space


@final
@dataclass(frozen=True)
class Grid(Method):
    """All coefficients that are whole steps apart. For two or three ingredients: the number grows as a power of theirs.

    Args:
        step: Distance of neighbours, more than 0 and at most 1; it must divide the space into whole steps.

    Raises:
        ValueError: If ``step`` is out of range, or when the search begins if it does not divide the space.

    Example:
        >>> from lightning_merge.search import search
        >>> search(lambda a: -(a[1] - 0.3) ** 2, 2, Grid(step=0.1)).coefficients
        (0.7, 0.3)
    """

    step: float = 0.2

    def __post_init__(self) -> None:
        settle(self, step=number("step", self.step, "(0, 1]"))

    def exceeds(self, budget: int, space: Space, count: int) -> bool:
        """Whether there are more candidates than that.

        Args:
            budget: Evaluations that may be spent.
            space: The coefficients that are allowed.
            count: Number of ingredients; at least 1.
        """
        return next(islice(space.lattice(count, self.step), budget, None), None) is not None

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        for coefficients in space.lattice(count, self.step):  # noqa: UP028 - it takes no answers
            yield coefficients
