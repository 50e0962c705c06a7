"""Barriers: the loss on the line between two sets of weights."""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

from torch import Tensor

from lightning_merge._checks import instance, number, real
from lightning_merge.diagnostics._examination import Finding
from lightning_merge.diagnostics._geometry import (
    between,
    distance,
    mean,
)
from lightning_merge.weights import Weights

_BARRIER = 0.1
"""Rise of the loss above that of the worse end that counts as a barrier, as a share of it."""


def barrier(losses: Mapping[float, float]) -> float:
    """The most that a loss on a line exceeds the straight line between its ends; negative if it lies below all along.

    A loss that is a NaN exceeds everything: so is what comes back.

    Args:
        losses: The loss at each share of the way, 0 and 1 included, and at least one between.

    Raises:
        ValueError: If an end, or every point between, is missing.

    Example:
        >>> barrier({0.0: 1.0, 0.5: 5.0, 1.0: 3.0})
        3.0

    References:
        Frankle et al., "Linear mode connectivity and the lottery ticket hypothesis", ICML 2020, section 2.
    """
    instance("losses", losses, Mapping, "losses by share of the way")
    for share, loss in losses.items():
        number("losses", share, says="by share of the way, a number")
        real("losses", loss, "numbers by share of the way")
    if not {0.0, 1.0} < losses.keys():
        raise ValueError(f"`losses` must hold the shares 0, 1 and one between, got {sorted(losses)}.")
    rises = [loss - (1 - t) * losses[0.0] - t * losses[1.0] for t, loss in losses.items() if 0.0 < t < 1.0]
    return worst(rises)


def worst(losses: Sequence[float]) -> float:
    """The highest; a NaN is higher than any."""
    return max(losses, key=lambda loss: (math.isnan(loss), loss))


def on_the_line(
    candidates: Mapping[str, Mapping[str, Tensor]],
    loss: Callable[[Weights], float],
    measure: Callable[[Weights], Weights] | None,
    points: int,
    measures: dict[str, float],
) -> tuple[dict[float, float], list[Finding]]:
    """The loss between the two sets that are farthest apart, with statistics that fit each point."""

    def fitted(weights: Weights) -> float:
        return loss(weights | (measure(weights) if measure is not None else {}))

    one, other = max(combinations(candidates, 2), key=lambda pair: distance(candidates[pair[0]], candidates[pair[1]]))
    shares = [step / (points + 1) for step in range(points + 2)]
    line = {share: fitted(between(candidates[one], candidates[other], share)) for share in shares}
    worse = worst([line[0.0], line[1.0]])
    # A loss that is not a number is higher than any.
    highest = max((share for share in shares if 0 < share < 1), key=lambda x: (math.isnan(line[x]), line[x]))
    how = ", statistics measured" if measure is not None and measure(dict(candidates[one])) else ""
    measures |= {f"loss of {one}{how}": line[0.0], f"loss of {other}{how}": line[1.0], "barrier": barrier(line)}
    rise = line[highest]
    where = f"{highest:.0%} of the way from {one} to {other}"
    if len(candidates) > 2:
        measures["loss of the mean"] = fitted(mean(list(candidates.values())))
        if not measures["loss of the mean"] <= rise and not math.isnan(rise):
            rise, where = measures["loss of the mean"], "the mean of all"
    if rise <= (1 + _BARRIER) * worse and math.isfinite(rise):
        return line, []
    text = (
        f"a barrier of {barrier(line):.3g}: the loss is {rise:.3g} at {where}, and {worse:.3g} at the worse end. They"
        " lie in different basins. Keep the better one, or merge later snapshots, or models that share more of their"
        " training."
    )
    return line, [Finding("barrier", barrier(line), text)]
