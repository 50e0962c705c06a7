"""How much the weights of each update count in a result."""

import torch
from torch import Tensor


def of_decays(decays: Tensor) -> Tensor:
    """Shares in ``average <- d_i * average + (1 - d_i) * weights_i``: ``(1 - d_i) * d_(i+1) * ... * d_n``.

    Args:
        decays: Share of the average that each update kept, oldest first; float64.
    """
    later = torch.cat([decays[1:], decays.new_ones(min(1, len(decays)))])
    return (1.0 - decays) * later.flip(0).cumprod(0).flip(0)


def of_updates(first: int, last: int, updates: int, share: float | Tensor) -> Tensor:
    """The updates ``first`` to ``last`` of so many, counted from 1, count ``share`` each, the others nothing.

    Args:
        first: Of them.
        last: Of them.
        updates: How many there were.
        share: Of each, or one for each.
    """
    shares = torch.zeros(updates, dtype=torch.float64)
    shares[first - 1 : last] = share
    return shares
