"""Uniform mean that takes in only what does not make it worse."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, final

from lightning_merge._checks import flag, settle
from lightning_merge._choice import best, standing
from lightning_merge.rules._base import Rule
from lightning_merge.weights import State, Weights, clone, lerp_


@final
@dataclass(frozen=True)
class GatedMean(Rule):
    """``mean <- (n * mean + weights) / (n + 1)`` where that scores at least as well as ``mean``; else nothing changes.

    A score is of the candidate itself, so ``offer`` is handed a function that measures weights. ``update`` takes
    weights in unasked. With ``hard``, weights that score better than both the mean and the candidate become the mean,
    which starts again from them. A NaN or minus infinity is never accepted.

    Args:
        hard: Whether single weights can take the place of the mean.

    Raises:
        TypeError: If ``hard`` is neither True nor False.

    Example:
        >>> import torch
        >>> rule = GatedMean()
        >>> state = rule.init({"w": torch.tensor(0.0)})
        >>> closeness = lambda weights: -abs(float(weights["w"]) - 3)
        >>> [rule.offer(state, {"w": torch.tensor(w)}, closeness) for w in (2.0, 4.0, 10.0)]
        [True, True, False]
        >>> rule.result(state)
        {'w': tensor(3.)}

    References:
        Demir et al., "Adaptive stochastic weight averaging", 2024, algorithm 1. Their code does not undo what it
        rejects; this does.
    """

    callback: ClassVar[str] = "ASWA"

    hard: bool = False

    def __post_init__(self) -> None:
        settle(self, hard=flag("hard", self.hard))

    def init(self, weights: Weights) -> State:
        return {"mean": clone(weights), "count": 0, "score": -math.inf, "updates": 0, "rejected": 0}

    def update(self, state: State, weights: Weights) -> None:
        state["count"] += 1
        state["updates"] += 1
        lerp_(state["mean"], weights, 1 / state["count"])

    def offer(self, state: State, weights: Weights, score: Callable[[Weights], float]) -> bool:
        """Takes the weights in if that is no worse, and says whether.

        Args:
            state: Of this rule.
            weights: Not written to.
            score: The score of weights, higher is better. Called once, with ``hard`` twice.
        """
        candidate = clone(state["mean"])
        lerp_(candidate, weights, 1 / (state["count"] + 1))
        scores = {"mean": state["score"], "candidate": standing(score(candidate))}
        if self.hard and state["count"]:
            scores["alone"] = standing(score(weights))
        chosen = best(scores)
        if "candidate" in chosen:
            self._accept(state, candidate, state["count"] + 1, scores["candidate"])
            state["ties"] = state.get("ties", 0) + (len(chosen) > 1)
        elif chosen == ["alone"]:
            self._accept(state, clone(weights), 1, scores["alone"])
        else:
            state["rejected"] += 1
            return False
        return True

    def _accept(self, state: State, mean: Weights, count: int, score: float) -> None:
        state |= {"mean": mean, "count": count, "score": score, "updates": state["updates"] + 1}

    def stored(self, state: State) -> Weights | None:
        mean: Weights = state["mean"]
        return mean if state["updates"] else None

    def conclude(self, state: State) -> str | None:
        if not state["updates"]:
            return None
        equal = f", {ties} of them at a tie" if (ties := state.get("ties", 0)) else ""
        return f"{state['updates']} weights were accepted{equal} and {state['rejected']} rejected."
