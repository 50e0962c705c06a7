"""Sets of weights by their magnitudes, all tensors at once."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge.weights._names import Weights


@torch.no_grad()
def keep_larger_(target: Weights, source: Mapping[str, Tensor], equal: bool) -> None:
    """Per number what is further from zero: ``target <- source if |source| > |target|``, in place.

    A NaN or an infinity of either stays or becomes a NaN.

    Args:
        target: Written to.
        source: Same names, shapes, dtypes and devices.
        equal: Whether ``source`` also wins at equal magnitudes.
    """
    if not target:
        return
    kept, new = list(target.values()), [source[name] for name in target]
    wins = torch._foreach_abs(new)
    torch._foreach_sub_(wins, torch._foreach_abs(kept))
    torch._foreach_sign_(wins)  # then 1 where it wins and 0 where it does not
    if equal:
        torch._foreach_add_(wins, 1.0)
        torch._foreach_clamp_max_(wins, 1.0)
    else:
        torch._foreach_clamp_min_(wins, 0.0)
    torch._foreach_lerp_(kept, new, wins)  # at 0 and at 1 it does not round


def maximum_(target: Weights, source: Mapping[str, Tensor]) -> None:
    """``target <- max(target, source)`` per number, in place; same names, shapes, dtypes and devices."""
    if target:
        torch._foreach_maximum_(list(target.values()), [source[name] for name in target])


def minimum_(target: Weights, source: Mapping[str, Tensor]) -> None:
    """``target <- min(target, source)`` per number, in place; same names, shapes, dtypes and devices."""
    if target:
        torch._foreach_minimum_(list(target.values()), [source[name] for name in target])
