"""Every branch goes on from the mean of a random pair."""

import random
from dataclasses import dataclass
from typing import final

from lightning_merge._checks import seed, settle
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class Pairs(Policy):
    """``branch j <- branch a / 2 + branch b / 2`` with a pair of different branches drawn anew for every ``j``.

    Args:
        seed: Of the pairs; the same in all processes.

    Raises:
        ValueError: At a merge if there is only one branch.

    Example:
        >>> import torch
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=2)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(float(branch))
        >>> policy = Pairs()
        >>> policy.merge(policy.init(branches), branches)
        >>> branches.weights(0)["weight"].item()
        0.5

    References:
        Jolicoeur-Martineau et al., "PopulAtion Parameter Averaging (PAPA)", TMLR 2024, section 3 (PAPA-2).
    """

    seed: int = 0

    def __post_init__(self) -> None:
        settle(self, seed=seed("seed", self.seed))

    def init(self, branches: Branches) -> State:
        if branches.count < 2:
            raise ValueError(f"`Pairs` needs at least 2 branches, got {branches.count}.")
        return {"merges": 0}

    def merge(self, state: State, branches: Branches) -> None:
        numbers = random.Random(f"{self.seed}, {state['merges']}")
        state["merges"] += 1
        chosen = [numbers.sample(range(branches.count), 2) for _ in range(branches.count)]
        branches.mix([[0.5 * (i in pair) for i in range(branches.count)] for pair in chosen])
