"""Scaled sum of task vectors."""

from dataclasses import dataclass
from typing import final

from lightning_merge._checks import settle
from lightning_merge.combiners._additive import Additive
from lightning_merge.combiners._scale import Scale, checked_scale, scale_of


@final
@dataclass(frozen=True)
class Sum(Additive):
    """Task arithmetic: ``scale * (v_1 + ... + v_t)``.

    Args:
        scale: In ``(0, 10]``; 0.3 is usual for eight tasks. Vectors of different tasks are nearly orthogonal, so the
            norm of their sum grows like the root of their number: ``"1/sqrt(t)"`` keeps it, ``"1/t"`` is their mean.

    Raises:
        ValueError: If ``scale`` is outside its range.

    Example:
        >>> import torch
        >>> Sum(scale=0.5).combine([{"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}])
        {'w': tensor(2.)}

    References:
        Ilharco et al., "Editing models with task arithmetic", ICLR 2023, section 4.
    """

    scale: Scale = 0.3

    def __post_init__(self) -> None:
        settle(self, scale=checked_scale(self.scale))

    def _factor(self, count: int) -> float:
        return scale_of(self.scale, count)
