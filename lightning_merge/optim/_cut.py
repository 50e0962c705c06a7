"""Where to cut a tensor so that a share of it, the largest in magnitude, is kept."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge.optim._blocks import Draw
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

    def keep(self, values: Tensor, here: slice, draw: Draw, block: tuple[int, int, int]) -> Tensor:
        """Which of the values, those ``here`` in the part, are kept."""
        size = values.abs()
        if self.tied is not None:
            kept = size > self.threshold
            inside = self.tied[(self.tied >= here.start) & (self.tied < here.stop)]
            return kept.index_fill_(0, inside - here.start, True)
        if self.ties == 1:
            return size >= self.threshold
        return (size > self.threshold) | ((size == self.threshold) & draw.keep(self.ties, *block))


def find_cut(values: Tensor, whole: Part, draw: Draw, density: float) -> Cut:
    """Where to cut a tensor so that the share ``density`` of it is kept; the same on all processes that hold parts.

    Exact, the first of equal elements being kept, for a tensor that is no larger than the sample would be.
    """
    if not whole.numel:
        return Cut(0.0, 1.0, values.new_empty(0, dtype=torch.int64))
    size = int(KEPT_IN_SAMPLE / density)
    exact = whole.numel <= size
    if exact:
        size = whole.numel
        seen = values.new_zeros(size)
        seen[whole.start : whole.stop] = values.abs()
    else:
        seen = values.new_zeros(size)
        places = draw.sample(size)
        low, high = torch.searchsorted(places, torch.tensor([whole.start, whole.stop], device=places.device)).tolist()
        seen[low:high] = values[places[low:high] - whole.start].abs()
    whole.total_(seen)
    keep = max(int(density * size), 1)
    threshold = torch.kthvalue(seen, size - keep + 1).values
    above, equal = int((seen > threshold).sum()), int((seen == threshold).sum())
    wanted = keep - above
    if exact:
        tied = (seen == threshold).nonzero().view(-1)[:wanted] - whole.start
        return Cut(float(threshold), 1.0, tied[(tied >= 0) & (tied < whole.stop - whole.start)])
    return Cut(float(threshold), wanted / equal if equal > NOTABLE_TIES * keep + 1 else 1.0, None)
