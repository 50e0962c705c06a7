"""Isotropic merging."""

from dataclasses import dataclass
from typing import final

import torch

from lightning_merge._checks import settle
from lightning_merge.combiners._additive import Additive
from lightning_merge.combiners._base import Locality
from lightning_merge.combiners._overflow import narrowed, refuse_overflow
from lightning_merge.combiners._scale import Scale, checked_scale, scale_of
from lightning_merge.combiners._spectrum import decomposed, has_spectrum
from lightning_merge.weights import State, Weights


@final
@dataclass(frozen=True)
class IsoC(Additive):
    """The sum of the vectors with a flat spectrum: per matrix ``scale * mean(S) U V^T``, where ``sum_t v_t = U S V^T``.

    No task's directions are stronger than another's. That is done to tensors of two dimensions, (m, n); of all others
    the result is ``scale *`` their mean, as in the official code. Directions in which the sum is zero up to rounding
    (it has a rank r below ``min(m, n)``, as of adapters) stay zero, and the mean is over the other r values: the
    official code, which takes the mean over all, adds arbitrary directions there. A single vector is flattened too.

    A stream keeps the sum alone, and takes vectors out again. A singular value decomposition per matrix and result.

    Args:
        scale: In ``(0, 10]``, or shrinking with the number of tasks (``Sum``); 1 to 1.5 is usual.

    Raises:
        ValueError: If ``scale`` is outside its range.

    Example:
        >>> import torch
        >>> first, second = torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
        >>> IsoC().combine([{"w": first}, {"w": second}])
        {'w': tensor([[2., 0.],
                [0., 2.]])}

    References:
        Marczak et al., "No task left behind: isotropic model merging with common and task-specific subspaces", ICML
        2025.
    """

    scale: Scale = 1.0

    def __post_init__(self) -> None:
        settle(self, scale=checked_scale(self.scale))

    @property
    def locality(self) -> Locality:
        return "tensor"

    def _factor(self, count: int) -> float:
        return 1.0

    def _merged(self, state: State) -> Weights | None:
        count = state["updates"]
        return narrowed(self._flattened(state["kept"], count), state) if count else None

    def _combine_parts(self, vectors: list[tuple[int | str, Weights]]) -> Weights:
        return refuse_overflow(self._flattened(super()._combine_parts(vectors), len(vectors)))

    @torch.no_grad()
    def _flattened(self, total: Weights, count: int) -> Weights:
        factor = scale_of(self.scale, count)
        merged: Weights = {}
        for name, tensor in total.items():
            if has_spectrum(tensor):
                u, values, vt = decomposed(tensor)
                merged[name] = (u @ vt) * (factor * values.sum() / (values > 0).sum().clamp(min=1))
            else:
                merged[name] = tensor * (factor / count)
        return merged
