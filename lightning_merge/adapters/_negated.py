"""The opposite of an adapter."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge._checks import number
from lightning_merge._mergeable import lora_factors
from lightning_merge.adapters._products import layers_of
from lightning_merge.combiners._vectors import checked_vector
from lightning_merge.weights import Weights

IA3 = "ia3_l"
"""What peft calls the scalings of (IA)3."""


@torch.no_grad()
def negated(adapter: Mapping[str, Tensor], scale: float = 1.0) -> Weights:
    """The adapter that forgets: of a LoRA layer one factor, ``B <- -scale * B``; of (IA)3 ``v <- 1 - scale * (v - 1)``.

    At scale 1 that is ``-B A`` and ``2 - v``. Both factors with another sign would have the same product.

    Args:
        adapter: Named tensors of LoRA or of (IA)3.
        scale: How far, above 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If a tensor is neither, as a bias or a head that was trained too (their negative takes the base), or
            holds a NaN or an infinity, or ``scale`` is out of range.

    Example:
        >>> negated({"k.ia3_l": torch.tensor([[1.25], [0.5]])})
        {'k.ia3_l': tensor([[0.7500],
                [1.5000]])}

    References:
        Zhang et al., "Composing parameter-efficient modules with arithmetic operations", NeurIPS 2023, section 3.
    """
    adapter, scale = checked_vector("adapter", adapter), number("scale", scale, "(0, inf)", "a positive number")
    pairs = layers_of(adapter).values() if lora_factors(adapter) else ()
    before, after = {first for first, _ in pairs}, {second for _, second in pairs}
    if other := next((name for name in adapter if name not in before | after and not is_ia3(name)), None):
        raise ValueError(
            f"`{other}` is neither a factor of LoRA nor a scaling of (IA)3, and what is its opposite depends on the"
            " base: leave it out, or negate task vectors of whole models."
        )
    made: Weights = {}
    for name, tensor in adapter.items():
        if name in before:
            made[name] = tensor.clone()
        else:
            made[name] = tensor * -scale if name in after else 1 - scale * (tensor - 1)
    return made


def is_ia3(name: str) -> bool:
    """Whether a tensor is a scaling of (IA)3."""
    return IA3 in name.split(".")
