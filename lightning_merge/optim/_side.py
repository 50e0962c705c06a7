"""Tensors of one size at one merge, side by side: what the rules need off the CPU, where launches are what costs."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import final

import torch
from torch import Tensor

from lightning_merge.optim._blocks import Draw, level_of, spread_out
from lightning_merge.optim._cut import KEPT_IN_SAMPLE, NOTABLE_TIES
from lightning_merge.optim._task_vector import Stored
from lightning_merge.optim._turn import Moment, Turn
from lightning_merge.weights._held import Part
from lightning_merge.weights._precision import work_dtype


@final
@dataclass(frozen=True)
class Side(Moment):
    """Tensors of which this process holds the same part, as rows of matrices.

    Attributes:
        part: What of each is here.
        after: Their values after the wrapped step; written to.
        before: Those before.
        tau: Their task vectors; what is not stored is 0.
        draws: The random numbers of each.
    """

    part: Part
    after: Tensor
    before: Tensor
    tau: Tensor
    draws: Sequence[Draw]

    @classmethod
    def of(cls, turns: Sequence[Turn], after: Sequence[Tensor], before: Sequence[Tensor]) -> "Side":
        """Tensors of one part and dtype, at one merge."""
        first, numel = turns[0], after[0].numel()
        wide = work_dtype(after[0])
        rows = [torch.stack([t.reshape(numel) for t in tensors]).to(wide) for tensors in (after, before)]
        tau = _tau_rows([turn.tau for turn in turns], rows[0])
        shared = {field.name: getattr(first, field.name) for field in fields(Moment)}
        return cls(part=first.part, after=rows[0], before=rows[1], tau=tau, draws=[t.draw for t in turns], **shared)

    def kept(self, density: float) -> Tensor:
        """A random mask as numbers, 1 if kept."""
        kept = torch.empty_like(self.after)
        return torch.lt(self._words(), level_of(density), out=kept)

    def largest(self, density: float) -> Tensor:
        """Which elements are among the largest in magnitude of the whole tensor: what ``find_cut`` says, row by row."""
        part, sizes = self.part, self.after.abs()
        if not part.numel:
            return sizes > 0
        size = int(KEPT_IN_SAMPLE / density)
        if part.numel <= size:
            seen = sizes.new_zeros(len(sizes), part.numel)
            seen[:, part.start : part.stop] = sizes
            threshold, wanted = _threshold(part.total_(seen), density)
            equal = seen == threshold
            kept: Tensor = (seen > threshold) | (equal & (equal.cumsum(1) <= wanted))
            return kept.narrow(1, part.start, part.stop - part.start)
        places = spread_out(torch.stack([draw.uniform(size) for draw in self.draws]), part.numel)
        seen = sizes.new_zeros(places.shape)
        if sizes.shape[1]:
            here = (places >= part.start) & (places < part.stop)
            seen = sizes.gather(1, (places - part.start).clamp_(0, sizes.shape[1] - 1)).mul_(here)
        threshold, wanted = _threshold(part.total_(seen), density)
        equal = (seen == threshold).sum(1, keepdim=True)
        notable = equal > NOTABLE_TIES * max(int(density * size), 1) + 1
        level = level_of(torch.where(notable, wanted.double() / equal.double(), 1.0))
        among = (self._words() < level) | ~notable
        return torch.logical_or(sizes > threshold, among & (sizes == threshold))

    def _words(self) -> Tensor:
        return torch.stack([draw.words(self.part.start, self.part.stop) for draw in self.draws])


def _threshold(seen: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """The magnitude of the last that is kept of each row, and how many of those equal to it; columns."""
    size = seen.shape[1]
    keep = max(int(density * size), 1)
    threshold = torch.kthvalue(seen, size - keep + 1, dim=1, keepdim=True).values
    return threshold, keep - (seen > threshold).sum(1, keepdim=True)


def _tau_rows(stored: Sequence[Stored], like: Tensor) -> Tensor:
    """Task vectors of tensors of one size."""
    if all(kept.index is None for kept in stored):
        return torch.stack([kept.values for kept in stored]).to(like.dtype)
    found = torch.zeros_like(like)
    for row, kept in zip(found, stored, strict=True):
        values = kept.values.to(like.dtype)
        if kept.index is None:
            row.copy_(values)
        else:
            row.index_copy_(0, kept.index, values)
    return found
