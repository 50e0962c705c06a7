"""Whether an average can still follow: its updates may be too small for the precision it is kept in."""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from lightning_merge.weights import Weights

_FIRST = 4096
"""Updates before the first look; one more after each doubling, since a look waits for the device."""

_SLOW = 1.2e-3
"""Share of the way that an update goes, above which rounding is not worth a word: 6e-5 of a number in float32."""

_LOST = 0.25
"""Share of what an update changes in a tensor that rounding may take."""

LESS_OFTEN = "Take weights in less often: a schedule with more steps between updates."
"""The cure for means that give each update a smaller share than the one before."""


@torch.no_grad()
def watch_resolution(
    rule: object, update: int, average: Weights, weights: Mapping[str, Tensor], share: float, cure: str
) -> None:
    """Warns if rounding takes much of ``average <- average + share * (weights - average)``, which is about to be done.

    Args:
        rule: What the warning is about.
        update: Number of the update, from 1.
        average: Before the update; not written to.
        weights: What is taken in.
        share: How far the update goes, in (0, 1].
        cure: A sentence.
    """
    if share > _SLOW or update < _FIRST or update & (update - 1):
        return
    lost = {name: _lost(tensor, weights[name], share) for name, tensor in average.items() if tensor.numel()}
    behind = [name for name, part in lost.items() if float(part) > _LOST]
    if behind:
        others = f" and {len(behind) - 1} more tensors" if len(behind) > 1 else ""
        warnings.warn(
            f"{rule!r}: updates are below the resolution of {str(average[behind[0]].dtype).removeprefix('torch.')} in"
            f" `{behind[0]}`{others}: rounding takes more than a quarter of them, and the average does not follow."
            f" {cure}",
            stacklevel=3,
        )


def _lost(average: Tensor, weights: Tensor, share: float) -> Tensor:
    """Share of the update of a tensor that rounding takes; 0 if there is nothing to change."""
    weights = weights.to(average)
    moved = torch.lerp(average, weights, share).sub_(average)
    meant = (weights - average).mul_(share)
    size = meant.abs().sum()
    return torch.where(size > 0, moved.sub_(meant).abs().sum() / size, torch.zeros_like(size))
