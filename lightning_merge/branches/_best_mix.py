"""All branches go on from the mean with the shares that score best."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, final

from torch import Tensor

from lightning_merge import weights
from lightning_merge._checks import flag, instance, number, seed, settle, whole
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy, newly_branched
from lightning_merge.search import Coefficients, Found, Greedy, Grid, Method, search
from lightning_merge.weights import State, Weights


@final
@dataclass(frozen=True)
class BestMix(Policy):
    """Every branch goes on from ``sum over i of a_i * branch i``, with the shares ``a`` that score best.

    Branches are taken as they are at the merge, never as they once were. The last merge is a candidate too, measured
    again, so no merge is worse than to keep it. Between merges the last one is what is published. Ties go to what was
    tried last, so to new weights. ``BestMix(Greedy(), previous=False)`` is the greedy soup of the branches.

    The state's ``history`` has an entry per merge: ``shares``, one per branch, all 0 if the ``previous`` merge was
    kept; the ``score``; the number of ``evaluations``, how many of them were ``rejected``, as a NaN or infinitely bad,
    and how many before the one that was taken scored the same (``ties``).

    Args:
        method: How shares are searched. ``None``: along the whole line in steps of a tenth for two branches, greedily
            with shares of 0.2, 0.4, ..., 1 for more.
        previous: Whether the last merge is a candidate; the start is, at the first one.
        budget: Most candidates that are measured; needed for methods without an end.
        seed: Of methods that draw random numbers.
        min_gain: The last merge is kept unless another candidate scores higher by so much; at least 0, in units of the
            score. The best of a dozen is often better by chance: a margin near the score's standard error says no then.

    Raises:
        ValueError: If ``budget`` is less than 1, ``min_gain`` less than 0 or without ``previous``, or at a merge if
            every candidate was rejected.

    Example:
        >>> import torch
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=2)
        >>> branches.scorer = lambda candidate: -abs(candidate["weight"].item() - 0.7)
        >>> policy = BestMix(previous=False)
        >>> state = policy.init(branches)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(float(branch))
        >>> policy.merge(state, branches)
        >>> state["history"][0]["shares"], branches.weights(0)
        ([0.3, 0.7], {'weight': tensor([[0.7000]])})

    References:
        Jiang et al., "ForkMerge: Mitigating negative transfer in auxiliary-task learning", NeurIPS 2023, algorithm 1.
    """

    restarts: ClassVar[bool] = True
    needs_score: ClassVar[bool] = True

    method: Method | None = None
    previous: bool = True
    budget: int | None = None
    seed: int = 0
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        if self.method is not None:
            instance("method", self.method, Method, "a method of `lightning_merge.search`")
        settle(self, previous=flag("previous", self.previous), seed=seed("seed", self.seed))
        if self.budget is not None:
            settle(self, budget=whole("budget", self.budget, 1))
        settle(self, min_gain=number("min_gain", self.min_gain, "[0, inf)"))
        if self.min_gain and not self.previous:
            raise ValueError("`min_gain` is a margin over the last merge: it must be 0 with `previous=False`.")

    def init(self, branches: Branches) -> State:
        return {"merged": weights.clone(branches.mean()), "history": []}

    def look_again(self, state: State, branches: Branches) -> None:
        state["merged"] = {**state["merged"], **newly_branched(state["merged"], branches)}

    def published(self, state: State, branches: Branches, active: Mapping[str, Tensor]) -> Weights:
        # What has become trainable since then is not in the last merge.
        return {name: state["merged"].get(name, active[name]) for name in branches.live}

    def merge(self, state: State, branches: Branches) -> None:
        count = branches.count
        kept = state["merged"]

        def candidate(shares: Coefficients) -> Weights:
            own = shares[:count]
            return branches.mean(own) if any(own) else kept

        found = search(
            lambda shares: branches.score(candidate(shares)),
            count + self.previous,
            self.method or _usual(count),
            whole=int(self.previous),
            budget=self.budget,
            seed=self.seed,
        )
        if self.previous:
            found = _by_margin(found, self.min_gain)
        state["merged"] = candidate(found.coefficients)
        branches.assign(state["merged"])
        shares = list(found.coefficients[:count])
        rejected = sum(each.score is None for each in found.history)
        state["history"].append(
            {
                "shares": shares,
                "previous": not any(shares),
                "score": found.score,
                "evaluations": len(found.history),
                "rejected": rejected,
                "ties": found.ties,
            }
        )
        if rejected:
            warnings.warn(
                f"{rejected} of {len(found.history)} mixtures of branches were rejected, since their score was a NaN or"
                " an infinity.",
                stacklevel=2,
            )


def _by_margin(found: Found, margin: float) -> Found:
    """What was found, or the last merge, which is measured first, if the gain over it is less than the margin."""
    last = found.history[0]
    if last.score is None or not found.score - last.score < margin:
        return found
    return replace(found, coefficients=last.coefficients, score=last.score, ties=0)


def _usual(count: int) -> Method:
    return Grid(step=0.1) if count <= 2 else Greedy(shares=(0.2, 0.4, 0.6, 0.8, 1.0))
