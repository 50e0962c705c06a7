"""All branches go on from where their losses together are lowest, as far as Fisher information tells."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch

from lightning_merge._checks import number, settle, whole
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy
from lightning_merge.branches._weighted_average import checked_amounts, shares_of
from lightning_merge.importance._moments import keeps_moments, second_moments
from lightning_merge.weights import State, Weights, average_dtype


@final
@dataclass(frozen=True)
class FedFisher(Policy):
    """Descends on ``sum over i of F_i (w - branch i)^2 / 2`` from the mean of federated averaging: FedFisher.

    ``F_i`` is the diagonal of the Fisher information of branch i, for which the second moments stand that its Adam has
    (with their bias corrected, so no pass over data is needed). A step is ``m <- 0.9 m + v``, ``d <- 0.99 d + v^2``,
    ``w <- w - rate * m / (sqrt(d) + 0.01)`` with ``v = sum over i of F_i (w - branch i)``. Where no branch has
    information, and where there is much less than 0.01, nothing moves far from the mean. Buffers become their mean.

    The authors measure Fisher information on all data of a branch, send 15 bits of each number, and keep the best of
    every hundredth step by validation; here the last step counts. Memory: four further copies of the parameters while
    it runs. Time: some ten passes over them for each of ``iterations``.

    Args:
        amounts: As in ``WeightedAverage``; ``None`` for equal ones. They weigh the mean that it starts from.
        rate: More than 0.
        iterations: At least 1.

    Raises:
        ValueError: If an argument is out of range; at a merge if there is not one amount for each branch, or no
            optimizer keeps second moments.

    Example:
        >>> from lightning_merge.branches import InTurn
        >>> net = torch.nn.Linear(1, 1, bias=False)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> branches = InTurn(net, [adam], count=2)
        >>> for branch, (weight, information) in enumerate(((0.0, 1.0), (4.0, 3.0))):
        ...     branches.activate(branch)
        ...     _ = branches.weights(branch)["weight"].fill_(weight)
        ...     moments = {"exp_avg_sq": torch.full((1, 1), information), "step": torch.tensor(1e9)}
        ...     adam.state[net.weight] = {**moments, "exp_avg": torch.zeros(1, 1)}
        >>> FedFisher().merge({}, branches)
        >>> round(branches.weights(0)["weight"].item(), 2)
        3.0

    References:
        Jhunjhunwala et al., "FedFisher: leveraging Fisher information for one-shot federated learning", AISTATS 2024,
        algorithm 1.
    """

    restarts: ClassVar[bool] = True

    amounts: Sequence[float] | None = None
    rate: float = 0.01
    iterations: int = 2000

    def __post_init__(self) -> None:
        if self.amounts is not None:
            settle(self, amounts=checked_amounts(self.amounts))
        settle(self, rate=number("rate", self.rate, "(0, inf)"))
        settle(self, iterations=whole("iterations", self.iterations, 1))

    @torch.no_grad()
    def merge(self, state: State, branches: Branches) -> None:
        amounts = [1.0] * branches.count if self.amounts is None else self.amounts
        new = branches.mean(shares_of(amounts, branches.count))
        if not any(map(keeps_moments, branches.optimizers)):
            raise ValueError("`FedFisher` takes the second moments of an optimizer of Adam's kind, and there is none.")
        information, pulled = self._sums(branches)
        for name, total in information.items():
            new[name] = self._descended(new[name], total.to(new[name]), pulled[name].to(new[name]))
        branches.assign(new)

    def _sums(self, branches: Branches) -> tuple[Weights, Weights]:
        """``sum of F_i`` and ``sum of F_i * branch i``."""
        before, moments = branches.active, []
        for branch in branches.own:
            branches.activate(branch)
            found, _ = second_moments(branches.parameters, branches.optimizers)
            moments.append(found)
        branches.activate(before)
        waiting = iter(moments)

        def both(own: Weights) -> Weights:
            known = next(waiting)
            parts: Weights = {}
            for name in branches.parameters:
                wide = own[name].detach().to(average_dtype(own[name]))
                # A branch that has not stepped a parameter knows nothing of it.
                square = known[name].to(wide) if name in known else torch.zeros_like(wide)
                parts |= {f"information {name}": square, f"pulled {name}": square * wide}
            return parts

        mean = branches.start_mean(both).result()
        sums = {key: tensor * branches.count for key, tensor in mean.items()}
        return (
            {name: sums[f"information {name}"] for name in branches.parameters},
            {name: sums[f"pulled {name}"] for name in branches.parameters},
        )

    def _descended(self, found: torch.Tensor, information: torch.Tensor, pulled: torch.Tensor) -> torch.Tensor:
        moved, squares = torch.zeros_like(found), torch.zeros_like(found)
        for _ in range(self.iterations):
            slope = information * found - pulled
            moved = moved.mul_(0.9).add_(slope)
            squares = squares.mul_(0.99).addcmul_(slope, slope)
            found = found - self.rate * moved / (squares.sqrt() + 0.01)
        return found
