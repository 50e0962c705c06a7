"""Factors of products."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge._checks import LISTED, number, whole
from lightning_merge._mergeable import named
from lightning_merge.adapters._products import layers_of
from lightning_merge.combiners._vectors import checked_vector
from lightning_merge.weights import Weights, average_dtype


@torch.no_grad()
def factored(
    vector: Mapping[str, Tensor], like: Mapping[str, Tensor], rank: int | None = None, scale: float = 1.0
) -> tuple[Weights, float]:
    """An adapter of the nearest products of a rank, and how far they are: ``|kept - vector| / |vector|``.

    ``U_r S_r V_r^T`` of each layer's ``vector = U S V^T``, the singular values shared out evenly between the factors;
    the distance is a Frobenius norm over all layers. Of a rank above the matrix' own the other rows are zero.

    Args:
        vector: Products, as ``products`` names them: what a combiner made of several, say.
        like: An adapter of the same layers: names, dtypes, and all that is no factor.
        rank: At least 1; by default that of ``like``.
        scale: What the layer will multiply the product with (``lora_alpha / r``); not 0.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If the vector is of other layers or shapes than the adapter, holds a NaN or an infinity, or an
            argument is out of range.

    Example:
        >>> like = {"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.ones(2, 1)}
        >>> adapter, lost = factored({"q.weight": torch.diag(torch.tensor([4.0, 3.0]))}, like)
        >>> (adapter["q.lora_B.weight"] @ adapter["q.lora_A.weight"]).abs(), lost
        (tensor([[4., 0.],
                [0., 0.]]), 0.6)
    """
    vector, like, scale = checked_vector("vector", vector), dict(named("like", like)), number("scale", scale)
    if not scale:
        raise ValueError("`scale` must not be 0.")
    chosen = None if rank is None else whole("rank", rank, 1, LISTED)
    layers, off, size = layers_of(like), 0.0, 0.0
    if other := sorted(vector.keys() ^ layers.keys()):
        raise ValueError(f"`vector` is of other layers than `like`: `{other[0]}` is in one of them only.")
    made = dict(like)
    for weight, (first, after) in layers.items():
        a, b, whole_one = like[first], like[after], vector[weight]
        if whole_one.shape != (len(b), *a.shape[1:]):
            raise ValueError(f"`{weight}` of `vector` is {tuple(whole_one.shape)}, not {(len(b), *a.shape[1:])}.")
        down, up, lost = _truncated(whole_one.flatten(1) / scale, len(a) if chosen is None else chosen)
        made[first] = down.reshape(-1, *a.shape[1:]).to(a)
        made[after] = up.reshape(*up.shape, *b.shape[2:]).to(b)
        off += lost * scale**2
        size += float(whole_one.double().square().sum())
    return made, (off / size) ** 0.5 if size else 0.0


def _truncated(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Both factors, and the sum of squares of what they leave out."""
    left, values, right = torch.linalg.svd(matrix.to(average_dtype(matrix)), full_matrices=False)
    kept = values[:rank].sqrt()
    down, up = right[:rank] * kept[:, None], left[:, :rank] * kept
    if (lacking := rank - len(kept)) > 0:
        down = torch.cat([down, down.new_zeros(lacking, down.shape[1])])
        up = torch.cat([up, up.new_zeros(len(up), lacking)], 1)
    return down.contiguous(), up.contiguous(), float(values[rank:].double().square().sum())
