"""What the factors of LoRA layers add to the weights."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from lightning_merge._checks import number
from lightning_merge._mergeable import lora_factors, weight_of_factor
from lightning_merge.combiners._vectors import checked_vector
from lightning_merge.weights import Weights, average_dtype


@torch.no_grad()
def products(adapter: Mapping[str, Tensor], scale: float = 1.0) -> Weights:
    """``scale * B A`` of each LoRA layer, in float32 or wider, under the name of the layer's weight: a task vector.

    Args:
        adapter: Named tensors: ``....lora_A.weight`` and ``....lora_B.weight``, or what diffusers calls them. Others
            are left out.
        scale: What the layer multiplies the product with: ``lora_alpha / r``.

    Returns:
        Products, (out, in), of convolutions (out, in, height, width).

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no factor, two do not fit, one holds a NaN or an infinity, or there is a magnitude of
            DoRA, beside which a product is no vector.

    Example:
        >>> products({"q.lora_A.weight": torch.tensor([[1.0, 2.0]]), "q.lora_B.weight": torch.tensor([[3.0], [0.0]])})
        {'q.weight': tensor([[3., 6.],
                [0., 0.]])}
    """
    adapter, scale = checked_vector("adapter", adapter), number("scale", scale)
    found: Weights = {}
    for weight, (first, after) in layers_of(adapter).items():
        a, b = (adapter[name].to(average_dtype(adapter[name])) for name in (first, after))
        if b.shape[1:2] != a.shape[:1] or b[0, 0].numel() != 1:
            raise ValueError(f"`{first}` and `{after}` are no factors: {tuple(a.shape)} and {tuple(b.shape)}.")
        found[weight] = (scale * (b.flatten(1) @ a.flatten(1))).reshape(len(b), *a.shape[1:])
    return found


def layers_of(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """By the name of the layer's weight, those of its factors: what is applied first, and what comes after it.

    Raises:
        ValueError: If there is none, or a magnitude of DoRA.
    """
    names = list(names)
    if dora := next((name for name in names if "lora_magnitude" in name), None):
        raise ValueError(
            f"`{dora}` is a magnitude of DoRA, which scales the weight and the product together: merge each adapter"
            " into the weights of its model (peft: `merge_and_unload()`), and those."
        )
    pairs = lora_factors(names)
    if not pairs:
        raise ValueError("`adapter` must hold factors of LoRA layers (`lora_A`, `lora_B`), got none.")
    layers: dict[str, tuple[str, str]] = {}
    for first, after in pairs:
        weight = weight_of_factor(first)
        if weight in layers:
            raise ValueError(f"`{weight}` has factors twice, `{layers[weight][0]}` and `{first}`: hand in one adapter.")
        layers[weight] = (first, after)
    return layers
