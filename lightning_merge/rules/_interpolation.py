"""The line through where a run began and where it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

from lightning_merge._files import read
from lightning_merge.rules._base import Rule
from lightning_merge.weights import State, Weights, canonical, clone, copy_, first_mismatch, lerp_


@final
@dataclass(frozen=True)
class Interpolation(Rule):
    """``anchor + alpha * (weights - anchor)``, of the weights last taken in; the anchor is where the run began.

    Args:
        alpha: 0 is the anchor, 1 the trained weights, between them WiSE-FT, above 1 ExPO, which goes on beyond; in
            (0, 10].
        anchor: A checkpoint to use as the anchor instead of the weights it starts from.

    Raises:
        ValueError: If ``alpha`` is out of range, or at the start if the file is of another model.
        anchor = clone({name: tensor.to(weights[name].device) for name, tensor in found.items()})
        return {"anchor": anchor, "merged": clone(anchor), "updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        copy_(state["merged"], state["anchor"])
        lerp_(state["merged"], weights, self.alpha)
        state["updates"] += 1

    def result(self, state: State) -> Weights | None:
        return state["merged"] if state["updates"] else None

    def initial_share(self, state: State) -> float:
        return 1.0 - self.alpha if self.anchor is None and state["updates"] else 0.0
