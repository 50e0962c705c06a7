"""Uniform mean of task vectors."""

from dataclasses import dataclass
from typing import Any, final

from lightning_merge.combiners._elementwise import Elementwise
from lightning_merge.weights import State, Weights, add_, zero_


@final
@dataclass(frozen=True)
class Average(Elementwise):
    """Uniform mean of the task vectors seen so far: ``(v_1 + ... + v_t) / t``.

    Example:
        >>> import torch
        >>> Average().combine([{"w": torch.tensor(1.0)}, {"w": torch.tensor(3.0)}])
        {'w': tensor(2.)}

    References:
        Wortsman et al., "Model soups", ICML 2022, section 2.
    """

    @property
    def removable(self) -> bool:
        return True

    def _step(self, kept: Any, new: Any, count: int) -> None:
        kept += new

    def _factor(self, count: int) -> float:
        return 1 / count

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        if state["updates"] == 1:
            zero_(state["kept"])
        else:
            add_(state["kept"], vector, -1.0)
