"""Statistics of BatchNorm layers: whether they were measured, and on these weights."""

import math
from collections.abc import Mapping

from torch import Tensor

from lightning_merge._mergeable import named
from lightning_merge.diagnostics._geometry import (
    wide,
)


def never_measured(weights: Mapping[str, Tensor]) -> list[str]:
    """BatchNorm layers whose statistics are still those of the start: mean 0 and variance 1.

    Args:
        weights: Weights and buffers by name.
    """
    return [
        name.removesuffix(".running_mean")
        for name, running_mean in named("weights", weights).items()
        if name.endswith("running_mean")
        and not bool(running_mean.any())
        and bool((weights[name.replace("running_mean", "running_var")] == 1).all())
    ]


def statistics_shift(stored: Mapping[str, Tensor], measured: Mapping[str, Tensor]) -> float:
    """How far stored BatchNorm statistics are from measured ones: that of the worst layer, in standard deviations.

    ``sqrt(mean over channels of ((m - m') / s')^2 + log(s / s')^2)``, for means m and standard deviations s.

    Args:
        stored: ``running_mean`` and ``running_var`` of the layers by name; other tensors do not count.
        measured: Those that were measured, of the same names and shapes.

    Example:
        >>> import torch
        >>> stored = {"bn.running_mean": torch.tensor([0.0]), "bn.running_var": torch.tensor([4.0])}
        >>> measured = {"bn.running_mean": torch.tensor([6.0]), "bn.running_var": torch.tensor([4.0])}
        >>> round(statistics_shift(stored, measured), 3)
        3.0
    """
    named("stored", stored)
    worst = 0.0
    for name in named("measured", measured):
        if name.endswith("running_mean") and name not in stored:
            raise ValueError(f"`stored` lacks `{name}`, which was measured.")
        if name.endswith("running_mean"):
            variance = name.replace("running_mean", "running_var")
            # A channel that is constant says nothing; 1e-5 is what BatchNorm itself adds.
            now, then = wide(measured[variance]) + 1e-5, wide(stored[variance]).clamp(min=0) + 1e-5
            moved = (wide(stored[name]) - wide(measured[name])).square() / now
            worst = max(worst, math.sqrt(float((moved + (then / now).log().div(2).square()).mean())))
    return worst
