"""Uniform mean of task vectors."""

from dataclasses import dataclass
from typing import final

from lightning_merge.combiners._additive import Additive


@final
@dataclass(frozen=True)
class Average(Additive):
    """Uniform mean of the task vectors seen so far: ``(v_1 + ... + v_t) / t``.

    Example:
        >>> import torch
        >>> Average().combine([{"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}])
        {'w': tensor(2.)}

    References:
        Wortsman et al., "Model soups", ICML 2022, section 2.
    """

    def _factor(self, count: int) -> float:
        return 1 / count
