"""Uniform mean from an early step on, of which the best is kept."""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, final

from torch import Tensor

from lightning_merge._choice import is_eligible
from lightning_merge.rules._base import Rule
from lightning_merge.rules._resolution import LESS_OFTEN, watch_resolution
from lightning_merge.rules._shares import of_updates
from lightning_merge.weights import State, Weights, clone, lerp_


@final
@dataclass(frozen=True)
class SelectedMean(Rule):
    """``mean <- mean + (weights - mean) / n``, the weights it starts from included; published is the best-scored one.

    While the run goes on the result is the mean as it is. ``select`` is told its score, and keeps a copy of the best;
    after ``conclude`` that is the result. Two copies of the weights.

    Example:
        >>> import torch
        >>> rule = SelectedMean()
        >>> state = rule.init({"w": torch.tensor(99.0)})
        >>> for value, score in ((100.0, 0.7), (101.0, 0.9), (102.0, 0.8)):
        ...     rule.update(state, {"w": torch.tensor(value)})
        ...     rule.select(state, score)
        >>> rule.result(state)
        {'w': tensor(100.5000)}
        >>> rule.conclude(state)
        'The mean after 2 updates scored best.'
        >>> rule.result(state)
        {'w': tensor(100.)}

    References:
        Arpit et al., "Ensemble of averages: improving model selection and boosting performance in domain
        generalization", NeurIPS 2022, section 3 (SMA).
    """

    wants_score: ClassVar[Literal["raw", "own"] | None] = "own"
    callback: ClassVar[str] = "SMA"
    start_is_meant: ClassVar[bool] = True

    @property
    def can_be_undone(self) -> bool:
        return True

    def init(self, weights: Weights) -> State:
        return {
            "mean": clone(weights),
            "updates": 0,
            "best": {},
            "best_updates": 0,
            "score": -math.inf,
            "concluded": False,
        }

    def update(self, state: State, weights: Weights) -> None:
        state["concluded"] = False
        state["updates"] += 1
        share = 1 / (state["updates"] + 1)
        watch_resolution(self, state["updates"], state["mean"], weights, share, LESS_OFTEN)
        lerp_(state["mean"], weights, share)

    def evaluate(self, state: State, score: float, weights: Weights | None = None) -> None:
        self.select(state, -score)

    def select(self, state: State, score: float) -> None:
        """Takes in the score of the mean as it is, higher is better.

        Of equals the last is best, a NaN or minus infinity never.

        Args:
            state: What ``init`` gave and ``update`` went on with; changed in place.
            score: Higher is better.
        """
        if not is_eligible(score):
            state["unusable"] = state.get("unusable", 0) + 1
        elif score >= state["score"]:
            state["ties"] = state.get("ties", 0) + 1 if score == state["score"] else 0
            state |= {"best": clone(state["mean"]), "best_updates": state["updates"], "score": float(score)}

    def stored(self, state: State) -> Weights | None:
        chosen: Weights = state["best"] if state["concluded"] else state["mean"]
        return chosen if state["updates"] else None

    def conclude(self, state: State) -> str | None:
        state["concluded"] = bool(state["best_updates"])
        if not state["concluded"]:
            none = "Every score of the mean was a NaN or infinitely bad" if state.get("unusable") else None
            none = none or "No score of the mean was taken in"
            return f"{none}, so the last is published." if state["updates"] else None
        tied = f", the last of {ties + 1} at a tie" if (ties := state.get("ties", 0)) else ""
        return f"The mean after {state['best_updates']} updates scored best{tied}."

    def initial_share(self, state: State) -> float:
        return 1 / (int(state["best_updates" if state["concluded"] else "updates"]) + 1)

    def shares(self, state: State) -> Tensor:
        count = int(state["best_updates" if state["concluded"] else "updates"])
        return of_updates(1, count, state["updates"], 1.0 / (count + 1))

    def extend(self, state: State, weights: Weights) -> None:
        for kept in (state["mean"], state["best"]):
            if kept:
                kept.update(clone(weights))
