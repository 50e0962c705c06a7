"""The entries of a task vector that are largest in magnitude."""

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from lightning_merge.weights import Weights, average_dtype

TopK: TypeAlias = Literal["exact", "official_plus_one"]


def count_of(share: float, size: int) -> int:
    """``share * size`` rounded down, of a share that was written in decimals.

    Example:
        >>> count_of(0.29, 100), int(0.29 * 100)
        (29, 28)
    """
    return int(share * size + 1e-9)


def kth_largest(tensors: list[Tensor], k: int) -> float:
    """The k-th largest magnitude of all the tensors taken together, exactly; k starts at 1.

    Example:
        >>> kth_largest([torch.tensor([-3.0, 1.0]), torch.tensor([2.0])], k=2)
        2.0
    """
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    magnitudes = flat.to(average_dtype(flat)).abs_()
    if magnitudes.device.type != "cpu":
        return float(torch.topk(magnitudes, k, sorted=False).values.min())
    place = magnitudes.numel() - k
    values = magnitudes.numpy()  # torch's own selection takes ten times as long on a CPU
    values.partition(place)
    return float(values[place])


@torch.no_grad()
def trimmed(vector: Weights, density: float, topk_rule: TopK) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with all but the largest entries set to zero, in float32 or wider.

    Args:
        vector: The tensors that are ranked together.
        density: Share of entries that is kept, in ``(0, 1]``.
        topk_rule: ``"exact"`` keeps ``density * size`` rounded down but at least one, of equal ones those that come
            first, and tensors of zeros (frozen ones) do not count. ``"official_plus_one"`` keeps one more, and all that
            equal the last one kept.

    Example:
        >>> [(name, trimmed.tolist()) for name, trimmed in trimmed({"w": torch.tensor([1.0, -3.0, 2.0])}, 0.4, "exact")]
        [('w', [0.0, -3.0, 0.0])]
    """
    exact = topk_rule == "exact"
    ranked = [tensor for tensor in vector.values() if tensor.numel() and not (exact and not tensor.any())]
    size = sum(tensor.numel() for tensor in ranked)
    k = max(1, count_of(density, size)) if exact else min(int(density * size) + 1, size)
    threshold = kth_largest(ranked, k) if ranked else 0.0
    room = k - sum(int((tensor.abs() > threshold).sum()) for tensor in ranked) if exact else size
    for name, tensor in vector.items():
        mask, taken = _reaching(tensor, threshold, room)
        room -= taken
        yield name, tensor * mask


@torch.no_grad()
def ranked_between(tensor: Tensor, start: int, stop: int) -> Tensor:
    """A mask of the entries from rank ``start`` to before ``stop`` by magnitude; of equal ones the first ranks first.

    Example:
        >>> ranked_between(torch.tensor([9.0, -3.0, 2.0, 1.0]), 1, 3)
        tensor([False,  True,  True, False])
    """
    return _first(tensor, stop) & ~_first(tensor, start)


def _first(tensor: Tensor, k: int) -> Tensor:
    """A mask of the k largest magnitudes."""
    if k == 0 or tensor.numel() <= k:
        return torch.full_like(tensor, k > 0, dtype=torch.bool)
    threshold = kth_largest([tensor], k)
    mask, _ = _reaching(tensor, threshold, k - int((tensor.abs() > threshold).sum()))
    return mask


def _reaching(tensor: Tensor, threshold: float, room: int) -> tuple[Tensor, int]:
    """A mask of the magnitudes above the threshold and the first of those equal to it, and how many those are."""
    magnitudes = tensor.abs()
    mask = magnitudes > threshold
    equal = (magnitudes == threshold).reshape(-1).nonzero()[:room, 0]
    mask.view(-1)[equal] = True
    return mask, len(equal)
