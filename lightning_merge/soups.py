"""Soups: one model from several runs, by weights that are given, and the next start of a round of runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge.combiners import slerp
from lightning_merge.weights import Weights, average_dtype, first_mismatch, is_averaged


@torch.no_grad()
def soup(models: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None) -> Weights:
    """``sum of weights[i] * models[i]``, in float32 or wider; tensors of whole numbers are those of the last model.

    With one model per reward and weights for what is preferred, this is a rewarded soup: no training per preference.

    Args:
        models: Named tensors of several runs from one start, of the same names and shapes.
        weights: One share per model, together 1; by default equal ones. Negative ones extrapolate.

    Raises:
        ValueError: If there is no model, names or shapes differ, or the weights are not one per model and together 1.

    Example:
        >>> soup([{"w": torch.tensor(1.0)}, {"w": torch.tensor(5.0)}], [0.75, 0.25])
        {'w': tensor(2.)}

    References:
        Ramé et al., Rewarded soups, NeurIPS 2023. Wortsman et al., Model soups, ICML 2022.
    """
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    shares = [1 / len(models)] * len(models) if weights is None else list(weights)
    if len(shares) != len(models) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"`weights` must be {len(models)} numbers that together are 1, got {shares}.")
    for i, model in enumerate(models[1:], 2):
        if difference := first_mismatch(models[0], model):
            raise ValueError(f"model {i} of `models` is another model than the first: {difference}.")
    mixed: Weights = {}
    for name, last in models[-1].items():
        if not is_averaged(last):
            mixed[name] = last.clone()
            continue
        total = torch.zeros_like(last, dtype=average_dtype(last))
        for model, share in zip(models, shares, strict=True):
            total.add_(model[name], alpha=share)
        mixed[name] = total
    return mixed


def cocktail_weights(losses: Sequence[float], temperature: float = 5.0) -> list[float]:
    """``softmax(-losses / temperature)``: the weight of each model of a soup by its loss on a few examples.

    Args:
        losses: Mean loss of each model on examples of the target task; at least one.
        temperature: Above 0; low values prefer the best model.

    Raises:
        ValueError: If there are no losses, one is not finite, or ``temperature`` is not above 0.

    Example:
        >>> [round(weight, 4) for weight in cocktail_weights([2.0, 1.0, 3.0])]
        [0.3289, 0.4018, 0.2693]

    References:
        Xiao et al., LM-Cocktail, 2023; the temperature is that of the published code.
    """
    if not losses or not all(math.isfinite(loss) for loss in losses):
        raise ValueError(f"`losses` must be finite numbers, at least one, got {list(losses)}.")
    if temperature <= 0:
        raise ValueError(f"`temperature` must be above 0, got {temperature}.")
    best = min(losses)
    parts = [math.exp((best - loss) / temperature) for loss in losses]
    return [part / sum(parts) for part in parts]


def pareto_front(scores: Sequence[Sequence[float]]) -> list[int]:
    """Places of the points that no other point beats: none is at least as good in all scores and better in one.

    A point with a NaN among its scores is never one of them.

    Args:
        scores: For each point its scores, higher is better; equally many for each.

    Example:
        >>> pareto_front([(1.0, 0.0), (0.6, 0.6), (0.5, 0.5), (0.0, 1.0)])
        [0, 1, 3]
    """
    return [
        i
        for i, mine in enumerate(scores)
        if not any(map(math.isnan, mine))
        and not any(
            all(a >= b for a, b in zip(other, mine, strict=True)) and tuple(other) != tuple(mine) for other in scores
        )
    ]


@final
@dataclass(frozen=True)
class WARP:
    """``next start = start + eta * slerp(policy 1 - start, policy 2 - start, ...)``, per tensor, between fits.

    A round trains several policies from one start, each with its own seed or data and with KL to an exponential mean of
    itself (``EMA(decay=0.99)``), and merges them into the next start with a new optimizer.

    Args:
        eta: Share of the way to the merged policies that the next start lies, in (0, 1].

    Raises:
        ValueError: If ``eta`` is out of range.

    Example:
        >>> start = {"w": torch.tensor([0.0, 0.0])}
        >>> WARP(eta=0.5).merge(start, [{"w": torch.tensor([2.0, 0.0])}, {"w": torch.tensor([0.0, 2.0])}])
        {'w': tensor([0.7071, 0.7071])}

    References:
        Ramé et al., WARP: on the benefits of weight averaged rewarded policies, 2024, section 3.
    """

    eta: float = 0.3

    def __post_init__(self) -> None:
        if not 0.0 < self.eta <= 1.0:
            raise ValueError(f"`eta` must be in (0, 1], got {self.eta}.")

    @torch.no_grad()
    def merge(self, start: Mapping[str, Tensor], policies: Sequence[Mapping[str, Tensor]]) -> Weights:
        """The start of the next round; the n-th policy has a share of 1/n when it is taken in.

        Raises:
            ValueError: If there are fewer than two policies, or names or shapes differ.
        """
        if len(policies) < 2:
            raise ValueError(f"`policies` must be at least 2 models, got {len(policies)}.")
        for i, policy in enumerate(policies, 1):
            if difference := first_mismatch(start, policy):
                raise ValueError(f"policy {i} is another model than `start`: {difference}.")
        merged: Weights = {}
        for name, begun in start.items():
            if not is_averaged(begun):
                merged[name] = policies[-1][name].clone()
                continue
            begun = begun.to(average_dtype(begun))
            total = policies[0][name].to(begun) - begun
            for n, policy in enumerate(policies[1:], 2):
                total = slerp(total, policy[name].to(begun) - begun, 1 / n)
            merged[name] = begun + self.eta * total
        return merged
