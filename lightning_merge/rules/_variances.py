"""Running variances beyond the weights that they are of."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge.weights import Weights


@torch.no_grad()
def keep_variances_positive_(merged: Weights, weights: Mapping[str, Tensor]) -> None:
    """Running variances that came out at 0 or less, whose root is a NaN, become those of the weights, in place."""
    for name, tensor in merged.items():
        if name.endswith("running_var"):
            last = weights[name].to(tensor)
            tensor.copy_(torch.where((tensor <= 0) & (last > 0), last, tensor))
