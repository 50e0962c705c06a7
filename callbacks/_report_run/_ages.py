"""How old the weights in an average are, from what its rule knows and from when it took weights in."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lightning_merge._report._record import Age, Point, aged
from lightning_merge.callbacks._publication._average import Average


def age_of(average: Average, counted: Sequence[Point]) -> Age | None:
    """The age of the weights in an average at this moment; ``None`` if its rule does not know how much each counts.

    Args:
        average: As it is now.
        counted: Steps, as loggers count, with the updates by then.
    """
    shares = average.shares()
    if shares is None or not len(shares):
        return None
    steps = _steps(len(shares), counted, average.update_window or (1, len(shares)))
    ages = (steps[-1] - steps)[::-1]
    return aged(ages.tolist(), shares.flip(0).tolist(), average.initial_share)


def _steps(updates: int, counted: Sequence[Point], window: tuple[int, int]) -> NDArray[np.float64]:
    """The step of each update, evenly spread between those that are known."""
    reached: dict[float, int] = {}
    for step, count in counted:
        reached.setdefault(count, step)  # an average may have ended long before the run
    counts, steps = list(reached), list(reached.values())
    if len(counts) < 2:
        return np.linspace(*window, updates)
    per_update = (steps[-1] - steps[0]) / (counts[-1] - counts[0])
    return np.interp(np.arange(1, updates + 1), [0.0, *counts], [steps[0] - counts[0] * per_update, *steps])
