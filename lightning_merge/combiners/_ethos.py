"""Ethos: what of a vector is large along the singular vectors of the base."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge._checks import number
from lightning_merge._mergeable import named
from lightning_merge.combiners._vectors import checked_vector
from lightning_merge.weights import Weights, average_dtype, first_mismatch


@torch.no_grad()
def ethos(vector: Mapping[str, Tensor], base: Mapping[str, Tensor], threshold: float = 0.03) -> Weights:
    """``U filter(U^T v V) V^T`` per matrix, the base's being ``U S V^T``: what is to be subtracted.

    Along the base's singular vectors, entries smaller than ``threshold`` times the largest are general ability that
    any fine-tuning adds; they are dropped, so that they stay in the model. ``negate`` and ``add_vector`` subtract the
    rest. What lies outside of the base's singular vectors is dropped too. Filters of convolutions are matrices of a row
    per output channel; tensors of one dimension come back whole. A singular value decomposition per matrix.

    Args:
        vector: To forget.
        base: What it was fine-tuned from, as the paper does with a vector of ordinary data added; more names are
            allowed.
        threshold: In ``[0, 1]``; 0 only projects.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the base lacks a name of the vector or has it in another shape, a tensor holds a NaN or an
            infinity, or ``threshold`` is out of range.

    Example:
        >>> base = {"w": torch.diag(torch.tensor([2.0, 1.0]))}
        >>> ethos({"w": torch.tensor([[1.0, 0.01], [0.0, -0.5]])}, base)
        {'w': tensor([[ 1.0000,  0.0000],
                [ 0.0000, -0.5000]])}

    References:
        Gao et al., "Ethos: rectifying language models in orthogonal parameter space", Findings of NAACL 2024.
    """
    threshold = number("threshold", threshold, "[0, 1]")
    vector = checked_vector("vector", vector)
    own = checked_vector("base", {name: each for name, each in named("base", base).items() if name in vector})
    if (difference := first_mismatch(vector, own)) is not None:
        raise ValueError(f"`base` is of another model than `vector`: {difference}.")
    return {name: _filtered(tensor, own[name], threshold) for name, tensor in vector.items()}


def _filtered(tensor: Tensor, base: Tensor, threshold: float) -> Tensor:
    if tensor.ndim < 2 or not tensor.numel():
        return tensor.clone()
    v, w = (each.flatten(1).to(tensor.device, average_dtype(tensor)) for each in (tensor, base))
    left, _, right = torch.linalg.svd(w, full_matrices=False)
    along = left.T @ v @ right.T
    along = torch.where(along.abs() >= threshold * along.abs().amax(), along, 0.0)
    found: Tensor = left @ along @ right
    return found.reshape(tensor.shape)
