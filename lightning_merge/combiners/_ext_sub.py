"""Ext-Sub: what of a harmful vector is not shared with a good one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge.combiners._vectors import checked_vector
from lightning_merge.weights import Weights, average_dtype, first_mismatch


@torch.no_grad()
def ext_sub(vector: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> Weights:
    """``b - (b . u) u`` of each row, with ``u`` the unit vector along ``a / |a| + b / |b|``: what is to be subtracted.

    ``b`` is a row of the vector to forget, ``a`` the same row of a vector that is to stay; what lies along both is
    taken for ability and kept. ``negate`` and ``add_vector`` subtract the rest: ``base + a - alpha * ext_sub(b, a)``.
    Where a row of the expert is zero, nothing is shared, and all of ``b`` comes back (the official code: NaN).

    Args:
        vector: To forget: the vector of a harmful fine-tuning, or of (IA)3 its scaling less 1.
        expert: To keep; the same names and shapes. Rows are along the first axis; a tensor of one axis longer than 1 is
            one row.

    Raises:
        TypeError: If an argument is not named tensors.
        ValueError: If names or shapes differ, or a tensor holds a NaN, an infinity, or is no task vector's.

    Example:
        >>> ext_sub({"w": torch.tensor([[0.0, 2.0]])}, expert={"w": torch.tensor([[3.0, 0.0]])})
        {'w': tensor([[-1.0000,  1.0000]])}

    References:
        Hu et al., "Separate the wheat from the chaff: model deficiency unlearning via parameter-efficient module
        operation", AAAI 2024.
    """
    vector, expert = checked_vector("vector", vector), checked_vector("expert", expert)
    if (difference := first_mismatch(vector, expert)) is not None:
        raise ValueError(f"`expert` is of another model than `vector`: {difference}.")
    return {name: _deficient(tensor, expert[name]) for name, tensor in vector.items()}


def _deficient(tensor: Tensor, expert: Tensor) -> Tensor:
    one_row = tensor.squeeze().ndim < 2
    b, a = (
        (each.flatten() if one_row else each.flatten(1)).to(tensor.device, average_dtype(tensor))
        for each in (tensor, expert)
    )
    shared = _unit(_unit(a) + _unit(b)) * a.any(-1, keepdim=True)
    return (b - (b * shared).sum(-1, keepdim=True) * shared).reshape(tensor.shape)


def _unit(rows: Tensor) -> Tensor:
    norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows / torch.where(norms > 0, norms, 1.0)
