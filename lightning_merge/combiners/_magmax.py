"""Largest magnitude per parameter."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge.combiners._elementwise import Elementwise
from lightning_merge.combiners._scale import Scale, check_scale, scale_of


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

    shows_nan: ClassVar[bool] = False

    scale: Scale = 0.5
    magmax_tie: Literal["last", "first"] = "last"

    def __post_init__(self) -> None:
        check_scale(self.scale)
        if self.magmax_tie not in ("last", "first"):
            raise ValueError(f'`magmax_tie` must be "last" or "first", got {self.magmax_tie!r}.')

    def _step(self, kept: Any, new: Any, count: int) -> None:
        wins = abs(new) >= abs(kept) if self.magmax_tie == "last" else abs(new) > abs(kept)
        if isinstance(kept, Tensor):
            kept.copy_(torch.where(wins, new, kept))
        else:
            np.copyto(kept, new, where=wins)

    def _factor(self, count: int) -> float:
        return scale_of(self.scale, count)
