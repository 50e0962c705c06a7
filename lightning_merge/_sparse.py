"""Zeros that pruned models share."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_merge.weights import is_averaged

Masks: TypeAlias = Literal["keep", "intersect"]


def is_pruned(name: str, tensor: Tensor) -> bool:
    """Whether zeros of a tensor are its mask: weights of two dimensions or more, and masks of ``torch.nn.utils.prune``.

    Biases and norms begin at zero, which says nothing.
    """
    return is_averaged(tensor) and (tensor.ndim > 1 or name.endswith("_mask"))


@torch.no_grad()
def zero_in_any(name: str, tensors: Sequence[Tensor], masks: Masks) -> Tensor:
    """Where one of several tensors of a name is zero.

    Raises:
        ValueError: If zeros have to be kept, and are not the same in all.
    """
    zeros = tensors[0] == 0
    for i, tensor in enumerate(tensors[1:], 2):
        own = (tensor == 0).to(zeros.device)
        if masks == "keep" and (differing := int((own != zeros).sum())):
            raise ValueError(
                f"`{name}` of model {i} has other zeros than that of the first, in {differing} of {zeros.numel()}"
                " places, so that a mean is denser than either: prune all by one mask, or intersect the masks."
            )
        zeros |= own
    return zeros
