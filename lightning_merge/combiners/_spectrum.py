"""Singular values and vectors of what a task did to a matrix."""

import torch
from torch import Tensor


def has_spectrum(tensor: Tensor) -> bool:
    """Whether it is a matrix with entries."""
    return tensor.ndim == 2 and tensor.numel() > 0


def decomposed(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``U`` (m, r), ``S`` (r), ``V^T`` (r, n) with ``r = min(m, n)``, largest values first; zeros beyond the rank.

    Singular vectors of a value that is zero up to rounding are arbitrary. Here they are zero, so that what is made of
    them follows from the matrix alone.
    """
    u, values, vt = torch.linalg.svd(matrix, full_matrices=False)
    kept = values > values[:1] * (max(matrix.shape) * torch.finfo(values.dtype).eps)
    return u * kept, values * kept, vt * kept[:, None]


def polar(matrix: Tensor) -> Tensor:
    """The nearest matrix of orthonormal rows or columns, ``U V^T``; zero in directions in which the matrix is."""
    u, _, vt = decomposed(matrix)
    return u @ vt
