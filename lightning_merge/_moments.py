"""Mean and variance of each channel, taken together from parts."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import final

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK = 2**23
"""Activations that are widened to float64 at a time: 64 MB."""


@final
@dataclass(frozen=True)
class Moments:
    """Number, mean and sum of squared deviations of values, per channel."""

    count: int
    mean: Tensor
    squares: Tensor

    @classmethod
    def none(cls, running_mean: Tensor) -> "Moments":
        """Those of no values, for as many channels."""
        zeros = torch.zeros_like(running_mean, dtype=widest(running_mean.device))
        return cls(0, zeros, zeros)

    @classmethod
    def of(cls, values: Tensor) -> "Moments":
        """Those of values of shape (batch, channels, ...), not empty, taken a chunk at a time."""
        values = values.flatten(2) if values.dim() > 2 else values.unsqueeze(2)
        channels, places = values.shape[1:]
        total = None
        for rows in torch.split(values, max(1, _CHUNK // (channels * places))):
            for chunk in torch.split(rows, max(1, _CHUNK // channels), dim=2):
                wide = chunk.to(widest(chunk.device), copy=True)
                mean = wide.mean((0, 2))
                part = cls(wide.numel() // channels, mean, wide.sub_(mean[:, None]).square_().sum((0, 2)))
                total = part if total is None else total.joined(part)
        assert total is not None
        return total

    def joined(self, other: "Moments") -> "Moments":
        """Those of both."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + delta.square() * (self.count * other.count / count),
        )

    def variance(self, unbiased: bool) -> Tensor:
        """Of each channel; of no values 0."""
        return self.squares / max(1, self.count - unbiased)


def widest(device: torch.device) -> torch.dtype:
    """The widest precision of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def pooled(seen: Mapping[str, Moments], group: dist.ProcessGroup | None) -> dict[str, Moments]:
    """The moments of the values of all processes: two sums over one flat tensor each."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size(group) == 1:
        return dict(seen)
    own = list(seen.values())
    device = own[0].mean.device
    sizes = [moments.mean.numel() for moments in own]
    counts = torch.tensor([moments.count for moments in own], dtype=own[0].mean.dtype, device=device)
    sums = torch.cat([counts, *((moments.mean * moments.count).to(device) for moments in own)])
    dist.all_reduce(sums, group=group)
    totals = [int(count) for count in sums[: len(own)].tolist()]
    summed = torch.split(sums[len(own) :], sizes)
    means = [(part / max(1, total)).to(m.mean) for part, total, m in zip(summed, totals, own, strict=True)]
    # Squares about the common mean, which is known now: summing squares of the values would cancel digits.
    about = [m.squares + (m.mean - mean).square() * m.count for m, mean in zip(own, means, strict=True)]
    squares = torch.cat([part.to(device) for part in about])
    dist.all_reduce(squares, group=group)
    return {
        name: Moments(total, mean, part.to(mean))
        for name, total, mean, part in zip(seen, totals, means, torch.split(squares, sizes), strict=True)
    }
