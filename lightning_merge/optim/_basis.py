"""The basis of a span of stored weights: its Gram matrix, a few columns at a time, and what follows from it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_merge.optim._spread import sum_over_ranks_
from lightning_merge.weights import Weights

_CHUNK = 2**14
"""Columns whose inner products are taken at a time, in float64."""

_RANK_TOLERANCE = 1e-10


def mean_of(rows: Tensor) -> Tensor:
    """The mean of the rows, taken in float64."""
    parts = [columns.double().mean(0).to(rows.dtype) for columns in torch.split(rows, _CHUNK, dim=1)]
    return torch.cat(parts) if parts else rows.new_empty(0)


def orthonormal(rows_of: Weights, centre: Weights, n: int, centred: bool) -> tuple[Tensor, Tensor]:
    """``C``, of which the rows of ``C D`` are orthonormal, and where its coefficients start.

    Args:
        rows_of: The part of ``D`` of each tensor that is here, ``[n, numel]``; less the centre where there is one.
        centre: The mean of what was collected, of the same tensors; nothing for the span of ``D`` itself.
        n: How many were collected.
        centred: Whether there is a centre: on a process that holds no tensor ``centre`` does not say it.
    """
    gram = torch.zeros(n, n, dtype=torch.float64)
    size = torch.zeros(1, dtype=torch.float64)
    for name, rows in rows_of.items():
        for columns in torch.split(rows, _CHUNK, dim=1):
            wide = columns.double()
            gram += (wide @ wide.T).cpu()
        size += (centre[name] if centre else rows[0]).double().square().sum().cpu()
    sum_over_ranks_(gram)
    sum_over_ranks_(size)
    uncentred = gram
    if centred:
        # The mean was rounded, so the rows do not quite sum to 0: removed here, or that would be a direction.
        gram = gram - gram.mean(0, keepdim=True) - gram.mean(1, keepdim=True) + gram.mean()
    values, vectors = torch.linalg.eigh(gram)
    # What is less than the rounding of the stored weights says nothing about them.
    eps = max((torch.finfo(rows.dtype).eps for rows in rows_of.values()), default=0.0)
    kept = values > max(_RANK_TOLERANCE * float(values[-1]), 4.0 * eps**2 * float(size))
    values, vectors = values[kept].flip(0), vectors[:, kept].flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * largest.sign()  # eigenvectors have no sign of their own
    reach = (vectors / values.sqrt()).T.contiguous()
    mean = torch.full((n,), 1.0 / n, dtype=torch.float64)
    return reach, torch.zeros(len(reach), dtype=torch.float64) if centred else reach @ uncentred @ mean


def block_norms(rows_of: Weights, centre: Weights, n: int, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Reciprocal norms of each tensor's differences to the centre, ``[tensors, n]``, and where coefficients start."""
    norms = torch.zeros(len(names), n, dtype=torch.float64)
    for name, rows in rows_of.items():
        size = [columns.double().square().sum(1) for columns in torch.split(rows, _CHUNK, dim=1)]
        row = torch.stack([*size, torch.zeros(n, dtype=torch.float64, device=rows.device)]).sum(0).sqrt()
        # Tensors that never changed have no direction.
        floor = torch.finfo(rows.dtype).eps * float(centre[name].double().norm())
        norms[names.index(name)] = torch.where(row > floor, row, 0.0).cpu()
    sum_over_ranks_(norms)
    return torch.where(norms > 0, 1.0 / norms, 0.0), torch.zeros_like(norms)
