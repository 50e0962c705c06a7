"""Running means of consecutive weights, and what they are means of."""

from collections.abc import Iterable
from typing import Any, TypeAlias

from lightning_merge.weights import Weights, clone, lerp_

Segment: TypeAlias = dict[str, Any]
"""``mean`` of ``weight`` weights, the first and the last taken in at step ``first`` and ``last``.

One that has been evaluated also has its ``index`` among the evaluations and its ``score``.
"""


def empty() -> Segment:
    """A mean of nothing; no memory."""
    return {"mean": {}, "weight": 0, "first": 0, "last": 0}


def single(weights: Weights, step: int) -> Segment:
    """The weights of one step, not copied."""
    return {"mean": weights, "weight": 1, "first": step, "last": step}


def fold(target: Segment, segment: Segment, weight: int) -> None:
    """Takes the segment into the mean, ``weight`` times: ``mean <- mean + (segment - mean) * weight / total``."""
    target["weight"] += weight
    if target["weight"] == weight:
        target["mean"], target["first"] = clone(segment["mean"]), segment["first"]
    else:
        lerp_(target["mean"], segment["mean"], weight / target["weight"])
    target["first"] = min(target["first"], segment["first"])
    target["last"] = max(target["last"], segment["last"])


def merged(parts: Iterable[tuple[Segment, int]]) -> Segment:
    """The mean of segments with the weight of each, as a new one."""
    total = empty()
    for segment, weight in parts:
        fold(total, segment, weight)
    return total
