"""How the buffers of several branches become those of a mixture."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lightning_merge import weights
from lightning_merge._mergeable import carried, why_not
from lightning_merge.weights import Weights


@torch.no_grad()
def pooled(sets: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> Weights:
    """The buffers of a mixture of sets, in new tensors.

    Floating-point ones are averaged. A running variance is that of the mixed population, the mean of the variances
    plus the variance of the means: ``var = sum share * (var_i + (mean_i - mean)^2)``. Integers, which count, take the
    maximum. Sets whose share is 0 are not read.
    """
    chosen = [(each, share) for each, share in zip(sets, shares, strict=True) if share]
    floats = [{name: t for name, t in each.items() if weights.is_averaged(t)} for each, _ in chosen]
    result = weights.weighted_mean(floats, [share for _, share in chosen])
    for name in result:
        mean_name = name.removesuffix("running_var") + "running_mean"
        if name.endswith("running_var") and mean_name in result:
            for each, share in chosen:
                result[name] += share * (each[mean_name].to(result[mean_name]) - result[mean_name]).square()
    for name in sets[0]:
        if name not in result:
            own = [each[name] for each, _ in chosen]
            result[name] = carried(name, own) if why_not(own[0]) else torch.stack(own).amax(0)
    return result


@torch.no_grad()
def mix_buffers_(sets: Sequence[Mapping[str, Tensor]], matrix: Sequence[Sequence[float]]) -> None:
    """``buffers j <- those of the mixture with shares matrix[j]``, in place."""
    new = {tuple(row): pooled(sets, row) for row in matrix}
    for j, row in enumerate(matrix):
        if row[j] != 1:
            weights.copy_(sets[j], new[tuple(row)])
