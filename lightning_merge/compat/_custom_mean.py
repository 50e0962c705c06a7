"""A mean by a function of the user's, as Lightning's averaging callbacks take it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from torch import Tensor

from lightning_merge._checks import function
from lightning_merge.rules import Rule
from lightning_merge.weights import State, Weights, clone, copy_

AvgFn = Callable[[Tensor, Tensor, Tensor], Tensor]
MultiAvgFn = Callable[[list[Tensor], list[Tensor], Tensor], None]


@final
@dataclass(frozen=True)
class CustomMean(Rule):
    """``average <- avg_fn(average, weights, n)``, per tensor or for lists of them; the first weights are copied."""

    callback: ClassVar[str] = "WeightMerging"

    avg_fn: AvgFn | None = None
    multi_avg_fn: MultiAvgFn | None = None

    def __repr__(self) -> str:
        # Without the address of the function: files are compared by it.
        given = self.avg_fn or self.multi_avg_fn
        return f"CustomMean({getattr(given, '__qualname__', type(given).__name__)})"

    def init(self, weights: Weights) -> State:
        return {"average": clone(weights), "updates": 0}

    @torch.no_grad()
    def update(self, state: State, weights: Weights) -> None:
        average, count = state["average"], torch.tensor(state["updates"])
        if state["updates"] == 0:
            copy_(average, weights)
        elif self.multi_avg_fn is not None:
            self.multi_avg_fn(list(average.values()), [weights[name] for name in average], count)
        elif self.avg_fn is not None:
            for name, value in average.items():
                value.copy_(self.avg_fn(value, weights[name].detach(), count.to(value.device)))
        state["updates"] += 1

    def stored(self, state: State) -> Weights | None:
        return state["average"] if state["updates"] else None


def check_functions(**given: object) -> None:
    """Checks arguments that are functions, where they are given.

    Raises:
        TypeError: If one is not.
    """
    for argument, value in given.items():
        if value is not None:
            function(argument, value)
