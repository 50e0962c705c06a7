"""Soups: one model from several runs, by weights that are given, and the next start of a round of runs."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge._checks import number, numbers, one_of, sequence, settle
from lightning_merge._mergeable import (
    carried,
    named,
    put_constants,
    refuse_lora_in,
    refuse_without_values,
    several_named,
)
from lightning_merge._sparse import Masks, is_pruned, zero_in_any
from lightning_merge.combiners import slerp
from lightning_merge.combiners._vectors import refuse_unfit
from lightning_merge.weights import Weights, average_dtype, first_mismatch, is_averaged, nonfinite


@torch.no_grad()
def soup(
    models: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None, masks: Masks | None = None
) -> Weights:
    """``sum of weights[i] * models[i]``, in float32 or wider; counters are those of the last model.

    With one model per reward and weights for what is preferred, this is a rewarded soup: no training per preference.

    Args:
        models: Named tensors of several runs from one start, of the same names and shapes.
        weights: One share per model, together 1; by default equal ones. Negative ones extrapolate.
        masks: Of pruned models: ``"keep"`` wants the same zeros in all (of tensors of two dimensions or more),
            ``"intersect"`` has those of each in the mean, which is sparser; ``None`` looks at none.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no model, names or shapes differ, the weights are not one per model and together 1, a
            tensor that counts holds a NaN or an infinity, or is one that no mean is defined for and differs: 8-bit
            floats, quantised or packed whole numbers, masks, tensors of a class of its own, both factors of a LoRA
            layer; or if zeros differ under ``"keep"``.

    Example:
        >>> soup([{"w": torch.tensor(1.0)}, {"w": torch.tensor(5.0)}], [0.75, 0.25])
        {'w': tensor(2.)}

    References:
        Ramé et al., Rewarded soups, NeurIPS 2023. Wortsman et al., Model soups, ICML 2022. Zimmer et al., Sparse model
        soups, ICLR 2024 (``masks``).
    """
    models = several_named("models", models)
    if masks is not None:
        one_of("masks", masks, Masks)
    if not models:
        raise ValueError("`models` must hold at least one model, got none.")
    refuse_without_values("models", models)
    says = f"{len(models)} numbers that together are 1"
    shares = [1 / len(models)] * len(models) if weights is None else list(numbers("weights", weights, says=says))
    if len(shares) != len(models) or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"`weights` must be {len(models)} numbers that together are 1, got {shares}.")
    for i, model in enumerate(models[1:], 2):
        if difference := first_mismatch(models[0], model):
            raise ValueError(f"model {i} of `models` is another model than the first: {difference}.")
    parts = [(i, model, share) for i, (model, share) in enumerate(zip(models, shares, strict=True), 1) if share]
    refuse_lora_in([model for _, model, _ in parts])
    mixed: Weights = {}
    for name, last in models[-1].items():
        if not all(is_averaged(model[name]) for model in models):
            mixed[name] = carried(name, [model[name] for model in models])
            continue
        mixed[name] = _total(name, parts, average_dtype(last))
        if masks is not None and is_pruned(name, last):
            mixed[name].masked_fill_(zero_in_any(name, [model[name] for _, model, _ in parts], masks), 0)
    return mixed


def _total(name: str, parts: Sequence[tuple[int, Mapping[str, Tensor], float]], dtype: torch.dtype) -> Tensor:
    """The weighted sum of one tensor; what does not count is not read."""
    total = torch.zeros_like(parts[0][1][name], dtype=dtype)
    for _, model, share in parts:
        total.add_(model[name].to(total), alpha=share)
    if nonfinite({name: total}) and not put_constants(total, [model[name] for _, model, _ in parts]):
        for i, model, _ in parts:
            if nonfinite({name: model[name]}):
                raise ValueError(f"`{name}` of model {i} of `models` holds a NaN or an infinity. Leave that model out.")
        raise ValueError(f"`{name}` is too large for {dtype} with these `weights`.")
    return total


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
    losses = numbers("losses", losses, says="finite numbers, at least one")
    if not losses:
        raise ValueError(f"`losses` must be finite numbers, at least one, got {list(losses)}.")
    temperature = number("temperature", temperature, "(0, inf)", "above 0")
    best = min(losses)
    parts = [math.exp((best - loss) / temperature) for loss in losses]
    return [part / sum(parts) for part in parts]


def pareto_front(scores: Sequence[Sequence[float]]) -> list[int]:
    """Places of the points that no other point beats: none is at least as good in all scores and better in one.

    A point with a NaN among its scores is never one of them.

    Args:
        scores: For each point its scores, higher is better; equally many for each.

    Raises:
        TypeError: If they are not numbers.
        ValueError: If a point has more scores than another.

    Example:
        >>> pareto_front([(1.0, 0.0), (0.6, 0.6), (0.5, 0.5), (0.0, 1.0)])
        [0, 1, 3]
    """
    says = "scores for each point, equally many"
    points = [_scores(point, says) for point in sequence("scores", scores, says)]
    if len({len(point) for point in points}) > 1:
        raise ValueError(f"`scores` must be {says}, got {points}.")
    return [
        i
        for i, mine in enumerate(points)
        if not any(map(math.isnan, mine))
        and not any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in points)
    ]


def _scores(point: object, says: str) -> tuple[float, ...]:
    found = sequence("scores", point, says)
    return tuple(each if each != each else number("scores", each, "[-inf, inf]", says) for each in found)


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
        settle(self, eta=number("eta", self.eta, "(0, 1]"))

    @torch.no_grad()
    def merge(self, start: Mapping[str, Tensor], policies: Sequence[Mapping[str, Tensor]]) -> Weights:
        """The start of the next round; the n-th policy has a share of 1/n when it is taken in.

        Args:
            start: Where all policies of the round started.
            policies: The weights each has ended at; two at least.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If there are fewer than two policies, names or shapes differ, or a tensor holds a NaN, complex
                numbers, or what no mean is defined for.
        """
        named("start", start)
        policies = several_named("policies", policies)
        if len(policies) < 2:
            raise ValueError(f"`policies` must be at least 2 models, got {len(policies)}.")
        refuse_without_values("start", [start])
        refuse_without_values("policies", policies)
        for i, policy in enumerate(policies, 1):
            if difference := first_mismatch(start, policy):
                raise ValueError(f"policy {i} is another model than `start`: {difference}.")
        refuse_lora_in([start, *policies])
        merged: Weights = {}
        for name, begun in start.items():
            if not all(is_averaged(model[name]) for model in (start, *policies)):
                merged[name] = carried(name, [policy[name] for policy in policies])
                continue
            refuse_unfit({name: begun}, "of `start`")
            for i, model in enumerate((start, *policies)):
                if nonfinite({name: model[name]}):
                    where = f"policy {i} of `policies`" if i else "`start`"
                    raise ValueError(f"`{name}` of {where} holds a NaN or an infinity.")
            begun = begun.to(average_dtype(begun))
            total = policies[0][name].to(begun) - begun
            for n, policy in enumerate(policies[1:], 2):
                total = slerp(total, policy[name].to(begun) - begun, 1 / n)
            merged[name] = begun + self.eta * total
        return merged
