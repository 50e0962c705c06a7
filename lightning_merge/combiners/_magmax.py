"""Largest magnitude per parameter."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch

from lightning_merge._checks import one_of, settle
from lightning_merge.combiners._elementwise import Elementwise
from lightning_merge.combiners._pieces import library_of
from lightning_merge.combiners._scale import Scale, checked_scale, scale_of
from lightning_merge.weights import Weights, keep_larger_


@final
@dataclass(frozen=True)
class MagMax(Elementwise):
    """Per parameter the value of the task that moved it furthest: ``scale * v_s``, ``s = argmax_t |v_t|``.

    Made for tasks trained one after the other, each from where the last one ended: their vectors agree in most signs.

    Args:
        scale: In ``(0, 10]``, or shrinking with the number of tasks (``Sum``).
        magmax_tie: Which task wins at equal magnitudes, ``"last"`` (the official code) or ``"first"``.

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> import torch
        >>> MagMax(scale=0.5).combine([{"w": torch.tensor([1.0, -4.0])}, {"w": torch.tensor([-3.0, 2.0])}])
        {'w': tensor([-1.5000, -2.0000])}

    References:
        Marczak et al., "MagMax: leveraging model merging for seamless continual learning", ECCV 2024, section 4.
    """

    scale: Scale = 0.5
    magmax_tie: Literal["last", "first"] = "last"

    def __post_init__(self) -> None:
        settle(self, scale=checked_scale(self.scale))
        one_of("magmax_tie", self.magmax_tie, ("last", "first"), '"last" or "first"')

    def _step(self, out: Any, kept: Any, new: Any) -> None:
        kept, new, out = (torch.as_tensor(values) for values in (kept, new, out))
        wins = new.abs()
        # As numbers, 0 or 1, at which lerp does not round: torch's masks take ten times as long.
        (torch.ge if self.magmax_tie == "last" else torch.gt)(wins, kept.abs(), out=wins)
        torch.lerp(kept, new, wins, out=out)

    def _merge(self, out: Any, values: Sequence[Any]) -> Any:
        # The value furthest from zero is the largest or the smallest: that of the two which gives their sum its sign.
        library = library_of(out)
        largest, smallest = library.maximum(*values[:2], out=out), library.minimum(*values[:2])
        for new in values[2:]:
            library.maximum(largest, new, out=largest)
            library.minimum(smallest, new, out=smallest)
        total = library.add(largest, smallest)
        library.maximum(largest, library.negative(smallest, out=smallest), out=out)
        library.copysign(out, total, out=out)
        ties = total == 0
        if ties.any():
            tied = [new[ties] for new in values]
            out[ties] = super()._merge(library.empty_like(tied[0]), tied)
        return out

    def _fold_all(self, kept: Weights, vector: Weights) -> None:
        keep_larger_(kept, vector, equal=self.magmax_tie == "last")

    def _factor(self, count: int) -> float:
        return scale_of(self.scale, count)
