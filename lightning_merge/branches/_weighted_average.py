"""All branches go on from a mean with given shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

from lightning_merge._checks import numbers, settle
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class WeightedAverage(Policy):
    """Every branch goes on from ``sum over i of p_i * branch i``, ``p = amounts / sum(amounts)``: federated averaging.

    Args:
        amounts: One per branch, as the number of samples that it trains on; at least 0, one of them more than 0.

    Raises:
        ValueError: If ``amounts`` is out of range, or at a merge if there is not one for each branch.

    Example:
        >>> import torch
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=2)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(float(branch))
        >>> WeightedAverage((1000, 3000)).merge({}, branches)
        >>> branches.weights(0)["weight"].item()
        0.75

    References:
        McMahan et al., "Communication-efficient learning of deep networks from decentralized data", AISTATS 2017,
        algorithm 1.
    """

    restarts: ClassVar[bool] = True

    amounts: Sequence[float]

    def __post_init__(self) -> None:
        settle(self, amounts=checked_amounts(self.amounts))

    def merge(self, state: State, branches: Branches) -> None:
        branches.mix([shares_of(self.amounts, branches.count)] * branches.count)


def checked_amounts(amounts: Sequence[float]) -> tuple[float, ...]:
    """The amounts, if they are numbers of at least 0, one of them more than 0."""
    says = "numbers of at least 0, one of them more than 0"
    found = numbers("amounts", amounts, "[0, inf)", says)
    if not any(found):
        raise ValueError(f"`amounts` must be {says}, got {found}.")
    return found


def shares_of(amounts: Sequence[float], count: int) -> list[float]:
    """The amounts as shares of their sum."""
    if len(amounts) != count:
        raise ValueError(f"`amounts` must have one entry for each of the {count} branches, got {len(amounts)}.")
    return [amount / sum(amounts) for amount in amounts]
