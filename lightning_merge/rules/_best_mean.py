"""The uniform mean of the weights with the best scores."""

from dataclasses import dataclass
from typing import ClassVar, Literal, final

from lightning_merge._checks import settle, whole
from lightning_merge._choice import is_eligible
from lightning_merge.rules._base import Rule
from lightning_merge.weights import State, Weights, clone, weighted_mean

_MOST = 10**6


@final
@dataclass(frozen=True)
class BestMean(Rule):
    """``mean = (w_1 + ... + w_k) / k`` of the weights whose scores were the ``k`` lowest; of all while there are fewer.

    The weights come with their scores, at ``evaluate``, and nothing is copied at a step. Of equal scores the earliest
    is better; a NaN or infinitely bad score is never among them. ``k`` copies of the weights.

    Args:
        k: Weights that are kept; at least 1.

    Raises:
        ValueError: If ``k`` is out of range.

    Example:
        >>> import torch
        >>> rule = BestMean(k=2)
        >>> state = rule.init({"w": torch.tensor(0.0)})
        >>> for value, score in ((1.0, 0.9), (5.0, 0.2), (3.0, 0.4)):
        ...     rule.evaluate(state, score, {"w": torch.tensor(value)})
        >>> rule.result(state)
        {'w': tensor(4.)}

    References:
        "Checkpoint averaging" of the best checkpoints by a validation score, as fairseq and ESPnet do after a run.
    """

    decides_on_score: ClassVar[bool] = True
    wants_score: ClassVar[Literal["raw", "own"] | None] = "raw"
    merges_when_scored: ClassVar[bool] = True
    callback: ClassVar[str] = "BestK"

    k: int = 5

    def __post_init__(self) -> None:
        settle(self, k=whole("k", self.k, 1, _MOST))

    def init(self, weights: Weights) -> State:
        return {"kept": [], "updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        """Nothing: weights are taken in with their score."""

    def evaluate(self, state: State, score: float, weights: Weights | None = None) -> None:
        kept = state["kept"]
        is_full = len(kept) == self.k
        if weights is None or not is_eligible(score, "min") or (is_full and score >= kept[-1]["score"]):
            return
        better = sum(other["score"] <= score for other in kept)
        kept.insert(better, {"score": float(score), "weights": clone(weights)})
        del kept[self.k :]
        state["updates"] += 1
        state.pop("cache", None)

    def stored(self, state: State) -> Weights | None:
        kept = [each["weights"] for each in state["kept"]]
        if "cache" not in state and kept:
            state["cache"] = weighted_mean(kept, [1 / len(kept)] * len(kept))
        mean: Weights | None = state.get("cache")
        return mean

    def conclude(self, state: State) -> str | None:
        scores = [each["score"] for each in state["kept"]]
        return (
            f"It is the mean of {len(scores)} weights, scored {scores[0]:.6g} to {scores[-1]:.6g}." if scores else None
        )

    def extend(self, state: State, weights: Weights) -> None:
        state.pop("cache", None)
        for each in state["kept"]:
            each["weights"].update(clone(weights))
