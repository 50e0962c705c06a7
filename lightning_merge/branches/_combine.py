"""All branches go on from what a combiner makes of their ways."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch

from lightning_merge._checks import instance, one_of
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy, newly_branched
from lightning_merge.combiners import Combiner, add_vector, task_vector
from lightning_merge.combiners._vectors import refuse_unfit
from lightning_merge.weights import State, Weights


@final
@dataclass(frozen=True)
class Combine(Policy):
    """``base + combiner(branch 1 - base, ..., branch K - base)``, and every branch goes on from there.

    ``Combine(SLERP(scale=0.3))`` is WARP's round: the spherical mean of the ways of two branches, then a step back to
    the start of the round, which is the next start. ``Combine(ModelStock(), base="start")`` pulls back to the
    pretrained weights by how far the branches disagree. Buffers become their mean.

    Args:
        combiner: Merges the ways of the branches, taken in their order.
        base: ``"last"``: what the branches last went on from. ``"start"``: the weights of the start of the run.

    Raises:
        ValueError: If ``base`` is not one of these.

    Example:
        >>> from lightning_merge.branches import InTurn
        >>> from lightning_merge.combiners import Sum
        >>> branches = InTurn(torch.nn.Linear(1, 1, bias=False), [], count=2)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(1.0)
        >>> policy = Combine(Sum(scale=1.0))
        >>> state = policy.init(branches)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(2.0 + branch)
        >>> policy.merge(state, branches)
        >>> branches.weights(0)
        {'weight': tensor([[4.]])}

    References:
        Ramé et al., "WARP: on the benefits of weight averaged rewarded policies", 2024, algorithm 1. Jang et al.,
        "Model
        Stock: all we need is just a few fine-tuned models", ECCV 2024.
    """

    restarts: ClassVar[bool] = True

    combiner: Combiner
    base: Literal["last", "start"] = "last"

    def __post_init__(self) -> None:
        instance("combiner", self.combiner, Combiner)
        one_of("base", self.base, ("last", "start"))

    def init(self, branches: Branches) -> State:
        base = _parameters(branches, branches.mean())
        refuse_unfit(base, "of the branches")  # now, not at the first merge
        return {"base": base}

    def look_again(self, state: State, branches: Branches) -> None:
        new = newly_branched(state["base"], branches)
        refuse_unfit(new, "of the branches")
        state["base"] = {**state["base"], **new}

    @torch.no_grad()
    def merge(self, state: State, branches: Branches) -> None:
        mean = branches.mean()
        base = {name: tensor.to(mean[name]) for name, tensor in state["base"].items()}

        def ways() -> Iterator[Weights]:
            for j in range(branches.count):
                branch = branches.mean([float(i == j) for i in range(branches.count)])
                yield task_vector({name: branch[name] for name in base}, base)

        new = add_vector(base, self.combiner.combine(ways()))
        branches.assign({**mean, **new})
        if self.base == "last":
            state["base"] = new


def _parameters(branches: Branches, tensors: Weights) -> Weights:
    return {name: tensors[name] for name, t in branches.live.items() if isinstance(t, torch.nn.Parameter)}
