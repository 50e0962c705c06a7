"""Sum of task vectors without their smallest and largest entries."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge._checks import number, one_of, settle
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.combiners._ranked import largest
from lightning_merge.combiners._scale import Scale, checked_scale, scaled_result
from lightning_merge.combiners._trim import PIECE, count_of, rank_levels, reaching
from lightning_merge.weights import (
    State,
    Weights,
    add_,
    array,
    in_threads,
    matrices,
    on_host,
    slices,
    stacked,
    unstacked,
    zeros,
)


@final
@dataclass(frozen=True)
class Breadcrumbs(Combiner):
    """``scale * sum_t m_t v_t``: the mask of each vector leaves out its outliers and its smallest entries.

    Per tensor or row, ``outliers * size`` entries of the largest magnitude are left out, and the ``density * size``
    next largest are kept; both rounded down, at least one entry is kept, and of equal ones those that come first.

    Args:
        density: Share of entries kept, in ``(0, 1]``.
        outliers: Share of largest entries left out, in ``[0, 1)``; at most ``1 - density``.
        scale: In ``(0, 10]``, or shrinking with the number of tasks (``Sum``).
        scope: Whether entries are ranked within their ``"tensor"``, the paper's layer, or within each ``"row"`` along
            its last dimension, as in the official code, which drops all of a row of fewer than ``1 / density``.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> Breadcrumbs(density=0.5, outliers=0.25, scale=1.0).combine([{"w": torch.tensor([9.0, -3.0, 2.0, 1.0])}])
        {'w': tensor([ 0., -3.,  2.,  0.])}

    References:
        Davari and Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks", ECCV 2024,
        section 3.
    """

    density: float = 0.2
    outliers: float = 0.1
    scale: Scale = 0.4
    scope: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        density = number("density", self.density, "(0, 1]")
        outliers = number("outliers", self.outliers, "[0, 1)", "in [0, 1) and at most 1 - density")
        if density + outliers > 1.0 + 1e-9:
            raise ValueError(f"`outliers` must be in [0, 1) and at most 1 - density, got {outliers}.")
        settle(self, density=density, outliers=outliers)
        settle(self, scale=checked_scale(self.scale))
        one_of("scope", self.scope, ("tensor", "row"))

    @property
    def removable(self) -> bool:
        return True

    @property
    def locality(self) -> Locality:
        return "tensor"

    def init(self, like: Weights) -> State:
        return {"sum": zeros(like), "updates": 0}

    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        self._add(state, vector, 1.0)

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        self._add(state, vector, -1.0)

    def _add(self, state: State, vector: Weights, factor: float) -> None:
        if self.scope == "row" or not on_host(vector):
            for masked in self._masked_at_once(vector):
                add_({name: state["sum"][name] for name in masked}, masked, factor)
            return
        in_threads(lambda name: self._add_tensor(state["sum"][name], vector[name], factor), vector)

    def _add_tensor(self, total: Tensor, tensor: Tensor, factor: float) -> None:
        """A piece at a time, since the masked vector would be a further copy of the model."""
        (skipped, above), (level, room) = rank_levels(tensor, *self._ranks(tensor.numel()))
        own, add = total.contiguous(), np.add if factor > 0 else np.subtract
        into, flat = array(own.view(-1)), array(tensor.detach().to(total).reshape(-1))
        for where in slices(len(into), PIECE):
            new = flat[where]
            up, down, room = reaching(new, level, room)
            far_up, far_down, above = reaching(new, skipped, above)
            kept = (up ^ far_up) | (down ^ far_down)
            add(into[where], new * kept, out=into[where])
        if own is not total:
            total.copy_(own)

    def _merged(self, state: State) -> Weights | None:
        return scaled_result(state, "sum", self.scale)

    def _ranks(self, size: int) -> tuple[int, int]:
        """From which rank to before which one entries are kept."""
        skip = count_of(self.outliers, size)
        return skip, skip + max(1, count_of(self.density, size))

    @torch.no_grad()
    def _masked_at_once(self, vector: Weights) -> Iterator[Weights]:
        groups = list(stacked(vector) if self.scope == "tensor" else matrices(vector, first=False))
        for some in [[group] for group in groups] if on_host(vector) else [groups]:  # one read for all of them
            rows = [matrix for _, matrix in some]
            skipped, kept = zip(*(self._ranks(matrix.shape[1]) for matrix in rows), strict=True)
            masks = largest([*rows, *rows], [*skipped, *kept])
            masked: Weights = {}
            for (names, matrix), out, within in zip(some, masks, masks[len(rows) :], strict=False):
                masked |= unstacked(matrix * (within & ~out), names, vector)
            yield masked
