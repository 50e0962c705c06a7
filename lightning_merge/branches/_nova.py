"""All branches go on from a mean of their ways, each divided by how much it worked."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from lightning_merge._checks import number, settle
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy, newly_branched
from lightning_merge.branches._weighted_average import checked_amounts, shares_of
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class Nova(Policy):
    """``anchor - w * sum over i of p_i * (anchor - branch i) / a_i``, ``w = sum over i of p_i * a_i``: FedNova.

    ``a_i`` is the work of branch ``i`` since the last merge: its steps ``k``, or with momentum ``r`` the sum of ``(1 -
    r^m) / (1 - r)`` over ``m = 1..k``. So a branch that took more steps does not pull the mean to where its data lead.
    With equal work this is ``WeightedAverage``. A branch that took no step is left out. Buffers become their mean.

    Args:
        amounts: As in ``WeightedAverage``; ``None`` for equal ones.
        momentum: Of the SGD that the branches train with, in [0, 1). The authors reset it at a merge:
            ``optimizer_state="reset"``.

    Raises:
        ValueError: If an argument is out of range, or at a merge if there is not one amount for each branch.

    Example:
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=2)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(0.0)
        >>> policy = Nova()
        >>> state = policy.init(branches)
        >>> for branch, steps in enumerate((1, 3)):
        ...     branches.steps[branch] = steps
        ...     _ = branches.weights(branch)["weight"].fill_(float(steps))
        >>> policy.merge(state, branches)
        >>> branches.weights(0)["weight"].item()
        2.0

    References:
        Wang et al., "Tackling the objective inconsistency problem in heterogeneous federated optimization", NeurIPS
        2020, equation 9.
    """

    restarts: ClassVar[bool] = True

    amounts: Sequence[float] | None = None
    momentum: float = 0.0

    def __post_init__(self) -> None:
        if self.amounts is not None:
            settle(self, amounts=checked_amounts(self.amounts))
        settle(self, momentum=number("momentum", self.momentum, "[0, 1)"))

    def init(self, branches: Branches) -> State:
        start = branches.mean()
        return {"anchor": {name: start[name] for name, t in branches.live.items() if isinstance(t, torch.nn.Parameter)}}

    def look_again(self, state: State, branches: Branches) -> None:
        state["anchor"] |= newly_branched(state["anchor"], branches)

    @torch.no_grad()
    def merge(self, state: State, branches: Branches) -> None:
        work = [self._work(steps) for steps in branches.work()]
        amounts = [1.0] * branches.count if self.amounts is None else self.amounts
        shares = [share * (done > 0) for share, done in zip(shares_of(amounts, branches.count), work, strict=True)]
        if not any(shares):
            return  # nobody has moved
        shares = [share / sum(shares) for share in shares]
        effective = sum(share * done for share, done in zip(shares, work, strict=True))
        factors = [effective * share / done if done else 0.0 for share, done in zip(shares, work, strict=True)]
        # One mean, and then further than to it or not as far: the factors need not sum to one.
        total = sum(factors)
        new = branches.mean([factor / total for factor in factors])
        for name, kept in state["anchor"].items():
            anchor = kept.to(new[name])
            new[name] = state["anchor"][name] = torch.lerp(anchor, new[name], total)
        branches.assign(new)

    def _work(self, steps: int) -> float:
        if not self.momentum:
            return float(steps)
        return sum((1 - self.momentum**m) / (1 - self.momentum) for m in range(1, steps + 1))
