"""Sums of magnitudes, in double precision."""

import torch
from torch import Tensor


def magnitude(tensor: Tensor) -> Tensor:
    """Of all numbers."""
    return tensor.abs().sum(dtype=torch.float64)


def magnitudes(matrix: Tensor) -> Tensor:
    """Of each row."""
    return matrix.abs().sum(1, dtype=torch.float64)
