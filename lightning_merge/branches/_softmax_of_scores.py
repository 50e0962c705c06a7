"""All branches go on from a mean in which a branch counts by how well it does."""

import warnings
from dataclasses import dataclass
from typing import ClassVar, final

from lightning_merge._checks import number, settle
from lightning_merge._choice import is_eligible, shares_by_score
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class SoftmaxOfScores(Policy):
    """Every branch goes on from ``sum over i of a_i * branch i``, ``a = softmax(score / temperature)``.

    With the negative loss as score these are the weights of LM-Cocktail: one measurement per branch instead of a
    search. The state's ``history`` has ``shares`` and ``scores`` of every merge.

    Args:
        temperature: More than 0; in the unit of the score.

    Raises:
        ValueError: If ``temperature`` is out of range, or at a merge if no branch has a score that is
            neither a NaN nor infinitely bad.

    Example:
        >>> import torch
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=2)
        >>> branches.scorer = lambda candidate: 1.0
        >>> policy = SoftmaxOfScores()
        >>> state = policy.init(branches)
        >>> policy.merge(state, branches)
        >>> state["history"][0]["shares"]
        [0.5, 0.5]

    References:
        Xiao et al., "LM-Cocktail: Resilient tuning of language models via model merging", 2023, equation 4.
    """

    restarts: ClassVar[bool] = True
    needs_score: ClassVar[bool] = True

    temperature: float = 5.0

    def __post_init__(self) -> None:
        settle(self, temperature=number("temperature", self.temperature, "(0, inf)"))

    def init(self, branches: Branches) -> State:
        return {"history": []}

    def merge(self, state: State, branches: Branches) -> None:
        count = branches.count
        scores = [branches.score(branches.mean([float(i == j) for i in range(count)])) for j in range(count)]
        shares = shares_by_score(scores, self.temperature)
        if shares is None:
            raise ValueError(f"the score was a NaN or an infinity for all {count} branches, so none can be chosen.")
        if left_out := [j for j, score in enumerate(scores) if not is_eligible(score)]:
            warnings.warn(f"branches {left_out} are left out: their score was a NaN or an infinity.", stacklevel=2)
        branches.mix([shares] * count)
        state["history"].append({"shares": shares, "scores": scores})
