"""What TIES adds up of a trimmed vector, and whom the sums elect."""

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

ZeroSign: TypeAlias = Literal["zero", "official", "positive"]
Divisor: TypeAlias = Literal["count", "weight_sum"] | None


def additions(kept: Any, weight: float, counted: bool, keys: Any) -> Iterator[tuple[str, Any]]:
    """What is added to each sum of the state that there is; of an array of NumPy or a tensor.

    Args:
        kept: The vector with what was trimmed at 0.
        weight: Of its task.
        counted: Whether agreeing values are counted, not their weights summed.
        keys: The sums that there are.
    """
    if "positives" in keys:
        for key, mask in (("positives", kept > 0), ("negatives", kept < 0)):
            yield key, mask if counted else mask * weight
    if "votes" in keys:
        yield "votes", kept
    if weight != 1:
        kept = kept * weight
    # Of arrays too, since it is torch that does it without a look for NaN.
    values = torch.as_tensor(kept)
    for key, part in (("positive", values.clamp_min(0)), ("negative", values.clamp_max(0))):
        yield key, part if values is kept else part.numpy()


def signs(sums: Mapping[str, Tensor]) -> Tensor:
    """The sign that each entry elects, 0 where both are equal."""
    votes: Tensor = sums["votes"] if "votes" in sums else sums["positive"] + sums["negative"]
    return votes.sign()


def elected(sums: Mapping[str, Tensor], zero_sign: ZeroSign, divisor: Divisor, majority: Tensor | None) -> Tensor:
    """The mean of the values of the elected sign, of tensors that are rows.

    Args:
        sums: By key, one number per entry.
        zero_sign: Who is elected where positive and negative values cancel.
        divisor: What the sum of agreeing values is divided by.
        majority: The sign of all for ``"official"``; by default that of each row.
    """
    positive, negative = sums["positive"], sums["negative"]
    if divisor is not None:
        tiny = 1 if divisor == "count" else torch.finfo(torch.float32).tiny
        positive = positive / sums["positives"].clamp(min=tiny)
        negative = negative / sums["negatives"].clamp(min=tiny)
    found = signs(sums)
    if zero_sign == "positive":
        return torch.where(found >= 0, positive, negative)
    if zero_sign == "official":
        found = torch.where(found == 0, found.sum(1, keepdim=True).sign() if majority is None else majority, found)
        return torch.where(found > 0, positive, negative)
    return torch.where(found > 0, positive, torch.where(found < 0, negative, 0.0))
