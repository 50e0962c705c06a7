"""All branches go on from their mean."""

from dataclasses import dataclass
from typing import ClassVar, final

from lightning_merge.branches._base import Branches
from lightning_merge.branches._matrix import uniform
from lightning_merge.branches._policy import Policy
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class Average(Policy):
    """Every branch goes on from the mean of all: ``branch j <- sum over i of branch i / K``.

    Example:
        >>> import torch
        >>> from lightning_merge.branches import InTurn
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> branches = InTurn(layer, [], count=2)
        >>> branches.assign({"weight": torch.ones(1, 1)})
        >>> _ = branches.weights(1)["weight"].fill_(3.0)
        >>> Average().merge({}, branches)
        >>> branches.weights(0), branches.weights(1)
        ({'weight': tensor([[2.]])}, {'weight': tensor([[2.]])})

    References:
        Zhang et al., "Lookaround optimizer: k steps around, 1 step average", NeurIPS 2023, algorithm 1.
    """

    restarts: ClassVar[bool] = True

    def merge(self, state: State, branches: Branches) -> None:
        branches.mix(uniform(branches.count))
