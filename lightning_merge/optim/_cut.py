"""Where to cut a tensor so that a share of it, the largest in magnitude, is kept."""

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from lightning_merge.combiners._select import kth_largest
from lightning_merge.optim._blocks import Draw
from lightning_merge.weights import array
from lightning_merge.weights._held import Part

KEPT_IN_SAMPLE = 4096  # the kept share of a sample with so many kept is within 5 % of the tensor's at three sigma

NOTABLE_TIES = 0.01


@final
@dataclass(frozen=True)
class Cut:
    """Which elements are among the largest in magnitude.

    Attributes:
        threshold: Magnitude above which an element is kept.
        ties: Share of the elements of just this magnitude that is kept.
        tied: The places, in this process's part, of those that are; ``None`` to draw them.
    """

    threshold: float
    ties: float
    tied: Tensor | None

    def keep_(self, values: Tensor, here: slice, draw: Draw, block: tuple[int, int, int]) -> None:
        """Sets those of the values, which are ``here`` in the part, to zero that are not kept."""
        if self.tied is None and self.ties == 1:
            level = torch.tensor(self.threshold, dtype=values.dtype)
            torch.hardshrink(values, float(level.nextafter(torch.zeros_like(level))), out=values)
            return
        numbers = array(values)
        numbers *= array(self.keep(values, here, draw, block))

    def keep(self, values: Tensor, here: slice, draw: Draw, block: tuple[int, int, int]) -> Tensor:
        """Which of the values, those ``here`` in the part, are kept."""
        size = abs(array(values))  # NumPy compares ten times as fast
        if self.tied is not None:
            kept = torch.as_tensor(size > self.threshold)
            inside = self.tied[(self.tied >= here.start) & (self.tied < here.stop)]
            return kept.index_fill_(0, inside - here.start, True)
        if self.ties == 1:
            return torch.as_tensor(size >= self.threshold)
        kept = size == self.threshold
        kept &= array(draw.keep(self.ties, *block))
        kept |= size > self.threshold
        return torch.as_tensor(kept)


def find_cut(values: Tensor, whole: Part, draw: Draw, density: float, start: Tensor | None = None) -> Cut:
    """Where to cut a tensor so that the share ``density`` of it is kept; the same on all processes that hold parts.

    With a ``start``, where to cut ``values - start``, of which only what is looked at is computed.

    Exact, the first of equal elements being kept, for a tensor that is no larger than the sample would be.
    """
    if not whole.numel:
        return Cut(0.0, 1.0, values.new_empty(0, dtype=torch.int64))
    size = int(KEPT_IN_SAMPLE / density)
    exact = whole.numel <= size
    if exact:
        size = whole.numel
        seen = values.new_zeros(size)
        seen[whole.start : whole.stop] = (values if start is None else values - start).abs()
    else:
        seen = values.new_zeros(size)
        places = draw.sample(size)
        low, high = torch.searchsorted(places, torch.tensor([whole.start, whole.stop], device=places.device)).tolist()
        here = places[low:high] - whole.start
        seen[low:high] = (values[here] if start is None else values[here] - start[here]).abs()
    whole.total_(seen)
    keep = max(int(density * size), 1)
    threshold = _kth_largest(seen, keep)
    above, equal = (int(mask.sum()) for mask in _compared(seen, threshold))
    wanted = keep - above
    if exact:
        tied = torch.as_tensor(_compared(seen, threshold)[1]).nonzero().view(-1)[:wanted] - whole.start
        return Cut(threshold, 1.0, tied[(tied >= 0) & (tied < whole.stop - whole.start)])
    return Cut(threshold, wanted / equal if equal > NOTABLE_TIES * keep + 1 else 1.0, None)


def _kth_largest(sizes: Tensor, k: int) -> float:
    if isinstance(array(sizes), Tensor):
        return float(torch.kthvalue(sizes, sizes.numel() - k + 1).values)
    [(level, _)] = kth_largest([sizes], k)
    return level


def _compared(sizes: Tensor, threshold: float) -> tuple[Any, Any]:
    """Which are above, and which equal."""
    values = array(sizes)
    return values > threshold, values == threshold
