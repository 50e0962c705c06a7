"""What TIES adds up of a trimmed vector, and whom the sums elect."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

ZeroSign: TypeAlias = Literal["zero", "official", "positive"]
Divisor: TypeAlias = Literal["count", "weight_sum"] | None

EXTREMES = {"largest": "positive", "smallest": "negative"}
"""What is kept as the furthest of the values of a sign, not as their sum."""


def additions(new: Any, positive: Any, negative: Any, weight: float, counted: bool, keys: Any) -> Iterator[Any]:
    """What is added to each sum of the state that there is, after its key; of arrays of NumPy or tensors.

    Args:
        new: The vector.
        positive: A mask of the positive values that are not trimmed.
        negative: The same of the negative ones.
        weight: Of its task.
        counted: Whether agreeing values are counted, not their weights summed.
        keys: The sums that there are.
    """
    for key, sign in (("positive", positive), ("negative", negative)):
        if f"{key}s" in keys:
            yield f"{key}s", sign if counted else sign * weight
        values = new * sign
        if "votes" in keys:
            yield "votes", values
        if weight != 1:
            values = values * weight
        yield key, values
        for extreme in (extreme for extreme, of in EXTREMES.items() if of == key and extreme in keys):
            yield extreme, values


def signs(sums: Mapping[str, Tensor]) -> Tensor:
    """The sign that each entry elects, 0 where both are equal."""
    votes: Tensor = sums["votes"] if "votes" in sums else sums["positive"] + sums["negative"]
    return votes.sign()


def elected(sums: Mapping[str, Tensor], zero_sign: ZeroSign, divisor: Divisor, majority: Tensor | None) -> Tensor:
    """The mean of the values of the elected sign, or the furthest from zero, of tensors that are rows.

    Args:
        sums: By key, one number per entry.
        zero_sign: Who is elected where positive and negative values cancel.
        divisor: What the sum of agreeing values is divided by.
        majority: The sign of all for ``"official"``; by default that of each row.
    """
    furthest = "largest" in sums
    positive, negative = (sums["largest"], sums["smallest"]) if furthest else (sums["positive"], sums["negative"])
    if divisor is not None and not furthest:
        tiny = 1 if divisor == "count" else torch.finfo(torch.float32).tiny
        positive = positive / sums["positives"].clamp(min=tiny)
        negative = negative / sums["negatives"].clamp(min=tiny)
    found = signs(sums)
    if zero_sign == "positive":
        return torch.where(found >= 0, positive, negative)
    if zero_sign == "official":
        found = torch.where(found == 0, found.sum(1, keepdim=True).sign() if majority is None else majority, found)
        if not furthest:
            return torch.where(found > 0, positive, negative)
    return torch.where(found > 0, positive, torch.where(found < 0, negative, 0.0))
