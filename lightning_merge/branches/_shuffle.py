"""Branches exchange a few random numbers."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge._checks import number, seed, settle
from lightning_merge.branches._base import Branches
from lightning_merge.branches._policy import Policy
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class Shuffle(Policy):
    """Every coordinate of layer ``l`` is, with probability ``share * (1 - l / (L - 1))``, permuted over the branches.

    The first layer is shuffled most, the last one not at all. The mean of the branches and their spread about it stay,
    at every coordinate: unlike a pull to the mean, this keeps the branches diverse. A layer is what has parameters
    under one name, in the order of the module.

    Args:
        share: Probability in the first layer, in [0, 1].
        seed: Of all draws, together with the number of the merge; the same in all processes. In [-2**31, 2**32).

    Raises:
        ValueError: If ``share`` is out of range.

    Example:
        >>> from lightning_merge.branches import InTurn
        >>> branches = InTurn(torch.nn.Linear(3, 1, bias=False), [], count=2)
        >>> for branch in (0, 1):
        ...     _ = branches.weights(branch)["weight"].fill_(float(branch))
        >>> policy = Shuffle(share=1.0)
        >>> policy.merge(policy.init(branches), branches)
        >>> branches.weights(0)["weight"] + branches.weights(1)["weight"]
        tensor([[1., 1., 1.]])

    References:
        Fournier et al., "WASH: Train your ensemble with communication-efficient weight shuffling, then average", 2024.
    """

    share: float = 1e-3
    seed: int = 0

    def __post_init__(self) -> None:
        # The number of the merge takes the other half of what a generator is seeded with.
        settle(self, share=number("share", self.share, "[0, 1]"), seed=seed("seed", self.seed, 2**32 - 1))

    def init(self, branches: Branches) -> State:
        return {"merges": 0}

    @torch.no_grad()
    def merge(self, state: State, branches: Branches) -> None:
        generator = torch.Generator().manual_seed(self.seed * 2**32 + state["merges"])
        state["merges"] += 1
        parameters = {name: t for name, t in branches.live.items() if isinstance(t, torch.nn.Parameter)}
        layers = list(dict.fromkeys(name.rpartition(".")[0] for name in parameters))
        places: dict[str, Tensor] = {}
        for name, parameter in parameters.items():
            rate = self.share * (1 - layers.index(name.rpartition(".")[0]) / max(1, len(layers) - 1))
            places[name] = drawn_places(parameter.numel(), rate, generator)
        count = sum(map(len, places.values()))
        if not count:
            return
        order = drawn_orders(branches.count, count, generator)

        def chosen(own: dict[str, Tensor]) -> Tensor:
            return torch.cat([own[name].take(where.to(own[name].device)) for name, where in places.items()])

        values = branches.gather(chosen)
        together = torch.stack([each.to(values[0].device) for each in values])
        mixed = together.gather(0, order.to(together.device))
        for branch in branches.own:
            own = branches.weights(branch)
            pieces = torch.split(mixed[branch], [len(each) for each in places.values()])
            for (name, where), new in zip(places.items(), pieces, strict=True):
                new = new if own[name].is_complex() else torch.real(new)  # numbers beside complex ones became such
                own[name].put_(where.to(own[name].device), new.to(own[name]))


def drawn_places(numel: int, rate: float, generator: torch.Generator) -> Tensor:
    """Each of ``numel`` places with probability ``rate``, in order, at the cost of those that are drawn."""
    if rate <= 0 or rate >= 1:
        return torch.arange(numel if rate > 0 else 0)
    expected = numel * rate
    gaps = int(expected + 6 * expected**0.5) + 16
    places = torch.full((1,), -1.0, dtype=torch.float64)
    while places[-1] < numel:
        steps = torch.empty(gaps, dtype=torch.float64).geometric_(rate, generator=generator)
        places = torch.cat([places, places[-1] + steps.cumsum(0)])
    return places[(places >= 0) & (places < numel)].long()


def drawn_orders(branches: int, count: int, generator: torch.Generator) -> Tensor:
    """A random permutation of the branches for each of ``count`` places, of shape (branches, count)."""
    return torch.rand(count, branches, generator=generator).argsort(1).T
