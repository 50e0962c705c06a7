"""Scaled sum of task vectors."""

from dataclasses import dataclass
from typing import Any, final

from lightning_merge.combiners._elementwise import Elementwise
from lightning_merge.combiners._scale import Scale, check_scale, scale_of
from lightning_merge.weights import State, Weights, add_, zero_


@final
@dataclass(frozen=True)
class Sum(Elementwise):
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
        check_scale(self.scale)

    @property
    def removable(self) -> bool:
        return True

    def _step(self, kept: Any, new: Any, count: int) -> None:
        kept += new

    def _factor(self, count: int) -> float:
        return scale_of(self.scale, count)

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        if state["updates"] == 1:
            zero_(state["kept"])
        else:
            add_(state["kept"], vector, -1.0)
