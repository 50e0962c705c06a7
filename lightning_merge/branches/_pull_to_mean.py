"""All branches are pulled to their mean."""

from dataclasses import dataclass
from typing import final

from lightning_merge._checks import flag, number, settle
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class PullToMean(Policy):
    """``branch j <- (1 - p) * branch j + p * mean``, ``p = pull * lr / lr_0``: the mean stays, the spread shrinks.

    Args:
        pull: Share of the way to the mean at the largest learning rate, in [0, 1]. The authors take 0.01 every 10 steps
            from scratch, and 0.0005 for fine-tuning.
        with_rate: Whether the pull follows the learning rate of the first parameter group: ``lr_0`` is the largest of
            its schedule, as far as that is known (``max_lr``, or else ``initial_lr``), or the largest at a merge so
            far. Otherwise ``p = pull``.

    Raises:
        ValueError: If ``pull`` is out of range.

    Example:
        >>> import torch
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=2)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(float(branch))
        >>> PullToMean(pull=0.5).merge({}, branches)
        >>> branches.weights(0)["weight"].item(), branches.weights(1)["weight"].item()
        (0.25, 0.75)

    References:
        Jolicoeur-Martineau et al., "PopulAtion Parameter Averaging (PAPA)", TMLR 2024, equation 2.
    """

    pull: float = 0.01
    with_rate: bool = True

    def __post_init__(self) -> None:
        settle(self, pull=number("pull", self.pull, "[0, 1]"), with_rate=flag("with_rate", self.with_rate))

    def merge(self, state: State, branches: Branches) -> None:
        pull = self.pull * (_relative_rate(state, branches) if self.with_rate else 1.0)
        count = branches.count
        branches.mix([[(1 - pull) * (i == j) + pull / count for i in range(count)] for j in range(count)])


def _relative_rate(state: State, branches: Branches) -> float:
    """The learning rate as a share of the largest one, in [0, 1]."""
    if not branches.optimizers:
        return 1.0
    group = branches.optimizers[0].param_groups[0]
    rate = float(group["lr"])
    # Schedules that rise from the first rate, as OneCycleLR, say in the group how far, or are found out.
    known = float(group.get("max_lr", group.get("initial_lr", rate)))
    state["largest_rate"] = largest = max(rate, known, state.get("largest_rate", 0.0))
    return rate / largest if largest else 1.0
