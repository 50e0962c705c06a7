"""Adds one ingredient after the other as long as the score does not fall."""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from lightning_merge._checks import numbers, settle
from lightning_merge.search._method import Method, Proposals
from lightning_merge.search._spaces import Coefficients, Space, one_hot


@final
@dataclass(frozen=True)
class Greedy(Method):
    """From the best ingredient on: each next best is added if the score does not fall, ties included.

    With the default this is the greedy soup: who takes part counts equally. With several shares an ingredient gets the
    best of these shares of the mean weight of those that take part (ForkMerge's search, where ``shares=(0.2, 0.4, 0.6,
    0.8, 1.0)``), and in the end the weights are divided by their sum. It takes ``count`` evaluations for the order, and
    ``len(shares)`` for each ingredient but the best.

    Args:
        shares: What to try, each in (0, 1].

    Raises:
        ValueError: If ``shares`` is empty or one of them is out of range.

    Example:
        >>> from lightning_merge.search import search
        >>> values = (3.0, 1.0, 8.0)
        >>> search(lambda a: -abs(sum(x * v for x, v in zip(a, values)) - 2.0), 3, Greedy()).coefficients
        (0.5, 0.5, 0.0)

    References:
        Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy without
        increasing inference time", ICML 2022, recipe 1. Jiang et al., "ForkMerge: Mitigating negative transfer in
        auxiliary-task learning", NeurIPS 2023.
    """

    shares: Sequence[float] = (1.0,)

    def __post_init__(self) -> None:
        says = "numbers in (0, 1], at least one"
        settle(self, shares=numbers("shares", self.shares, "(0, 1]", says))
        if not self.shares:
            raise ValueError(f"`shares` must be {says}, got ().")

    def propose(self, space: Space, count: int, rng: random.Random) -> Proposals:
        alone = []
        for index in range(count):
            answer = yield space.alike(one_hot(count, index))
            alone.append(answer.value)
        first, *others = sorted(range(count), key=lambda index: -alone[index])
        weights = {first: 1.0}
        best = alone[first]
        for index in others:
            if alone[index] == -math.inf:
                continue  # rejected by itself
            mean = math.fsum(weights.values()) / len(weights)
            before = dict(weights)
            for share in self.shares:
                trial = {**before, index: share * mean}
                answer = yield space.alike(_normalised(trial, count))
                if answer.value >= best:
                    best, weights = answer.value, trial


def _normalised(weights: dict[int, float], count: int) -> Coefficients:
    total = math.fsum(weights.values())
    return tuple(weights.get(index, 0.0) / total for index in range(count))
