"""Which entries are largest in magnitude, for many tensors at once and without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def largest(groups: Sequence[Tensor], counts: Sequence[int], exact: bool = True) -> list[Tensor]:
    """A mask of each row's largest magnitudes: so many of them, those that come first of equal ones.

    One read for everything: whether in a row more are equal to the last one than fit.

    Args:
        groups: Matrices; each row is ranked for itself.
        counts: How many of each row, one number per matrix.
        exact: ``False`` keeps all that equal the last one.

    Example:
        >>> largest([torch.tensor([[1.0, -2.0, 3.0, 2.0]])], [2])
        [tensor([[False,  True,  True, False]])]
    """
    found, crowded = [], []
    for rows, count in zip(groups, counts, strict=True):
        if not 0 < count < rows.shape[1]:
            found.append(torch.full_like(rows, count > 0, dtype=torch.bool))
            continue
        level = _level(rows, count)
        mask = rows.abs() >= level
        found.append(mask)
        # Of zeros it does not matter which are kept.
        crowded.append((len(found) - 1, level, ((mask.sum(1) > count) & (level[:, 0] > 0)).any()))
    if exact and crowded and bool(torch.stack([more.to(crowded[0][2].device) for *_, more in crowded]).any()):
        for index, level, _ in crowded:
            found[index] = _first(groups[index], level, counts[index])
    return found


def _level(rows: Tensor, count: int) -> Tensor:
    """The magnitude of the last one that is kept, as a column."""
    return torch.topk(rows.abs(), count, dim=1, sorted=False).values.amin(1, keepdim=True)


def _first(rows: Tensor, level: Tensor, count: int) -> Tensor:
    sizes = rows.abs()
    above, equal = sizes > level, sizes == level
    return above | (equal & (equal.cumsum(1) <= count - above.sum(1, keepdim=True)))
