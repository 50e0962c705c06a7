"""Adapters of low rank, added up as products."""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_merge._checks import LISTED, number, numbers, one_of, whole
from lightning_merge._mergeable import carried, lora_factors, refuse_without_values, several_named
from lightning_merge.weights import Weights, average_dtype, first_mismatch, is_averaged, nonfinite


@torch.no_grad()
def compose_adapters(
    adapters: Sequence[Mapping[str, Tensor]],
    coefficients: Sequence[float],
    form: Literal["products", "factors"] = "products",
    rank: int | Literal["same"] | None = None,
) -> Weights:
    """``sum_i a_i B_i A_i`` of LoRA adapters, again as an adapter: LoraHub's composition.

    As products the factors of all stand beside each other, ``[a_1 B_1, a_2 B_2, ...] [A_1; A_2; ...]``: exact, and of
    the rank of all together, which the adapter's configuration has to say, with ``lora_alpha`` larger by as much.
    ``rank`` keeps the largest singular values. The published code adds the factors up on their own, ``(sum_i a_i B_i)
    (sum_i a_i A_i)``, which has the products of each with each other one, and of the same rank.

    Args:
        adapters: Named tensors of each, of the same names and shapes: ``....lora_A.weight`` and ``....lora_B.weight``
            or what diffusers calls them. Others have to be the same in all.
        coefficients: One number per adapter.
        form: ``"products"``, or ``"factors"`` as published.
        rank: Largest rank of each layer, by a truncated singular value decomposition, ``"same"`` for that it has in the
            adapters; ``None``: exact.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no adapter, none of their tensors is a factor, names or shapes differ, another tensor
            differs, a factor holds a NaN, the coefficients are not one for each, or ``rank`` is given with
            ``"factors"``.

    Example:
        >>> one = {"lora_A.weight": torch.tensor([[1.0, 2.0]]), "lora_B.weight": torch.tensor([[1.0], [0.0]])}
        >>> two = {"lora_A.weight": torch.tensor([[0.0, 1.0]]), "lora_B.weight": torch.tensor([[1.0], [2.0]])}
        >>> merged = compose_adapters([one, two], [0.5, -1.0])
        >>> merged["lora_B.weight"] @ merged["lora_A.weight"]
        tensor([[ 0.5000,  0.0000],
                [ 0.0000, -2.0000]])

    References:
        Huang et al., "LoraHub: efficient cross-task generalization via dynamic LoRA composition", COLM 2024.
    """
    models = several_named("adapters", adapters)
    if not models:
        raise ValueError("`adapters` must be at least one adapter, got none.")
    coefficients = numbers("coefficients", coefficients)
    if len(coefficients) != len(models):
        raise ValueError(f"`coefficients` must be {len(models)} numbers, got {len(coefficients)}.")
    one_of("form", form, ("products", "factors"))
    if rank is not None:
        rank = rank if rank == "same" else whole("rank", rank, 1, LISTED)
        if form == "factors":
            raise ValueError("`rank` must be left out for `form='factors'`, which keeps the rank.")
    refuse_without_values("adapters", models)
    for i, model in enumerate(models[1:], 2):
        if difference := first_mismatch(models[0], model):
            raise ValueError(f"adapter {i} of `adapters` is another one than the first: {difference}.")
    pairs = lora_factors(models[0])
    if not pairs:
        raise ValueError("`adapters` must hold factors of LoRA layers (`lora_A`, `lora_B`), got none.")
    factors = {name for pair in pairs for name in pair}
    merged: Weights = {name: _same(name, models) for name in models[0] if name not in factors}
    for first, after in pairs:
        for i, model in enumerate(models, 1):
            _refuse_no_numbers({name: model[name] for name in (first, after)}, i)
        wide = average_dtype(models[0][first])
        down = [model[first].to(wide) for model in models]
        up = [a * model[after].to(wide) for a, model in zip(coefficients, models, strict=True)]
        if form == "factors":
            a, b = sum(c * each for c, each in zip(coefficients, down, strict=True)), sum(up)
        else:
            a, b = _truncated(torch.cat(down), torch.cat(up, 1), len(down[0]) if rank == "same" else rank)
        merged[first], merged[after] = torch.as_tensor(a).to(models[0][first]), torch.as_tensor(b).to(models[0][after])
    return {name: merged[name] for name in models[0]}


def penalty(coefficients: Sequence[float], strength: float = 0.05) -> float:
    """``strength * mean |a|``: what LoraHub adds to its loss.

    Args:
        coefficients: One number per adapter; at least one.
        strength: At least 0.

    Raises:
        ValueError: If there is no coefficient, or ``strength`` is out of range.

    Example:
        >>> round(penalty([0.5, -1.0]), 6)
        0.0375
    """
    coefficients, strength = numbers("coefficients", coefficients), number("strength", strength, "[0, inf)")
    if not coefficients:
        raise ValueError("`coefficients` must be at least one number, got none.")
    return strength * sum(map(abs, coefficients)) / len(coefficients)


def _refuse_no_numbers(factors: Weights, number: int) -> None:
    for name, tensor in factors.items():
        if not is_averaged(tensor):
            raise ValueError(
                f"`{name}` of adapter {number} of `adapters` holds {str(tensor.dtype).removeprefix('torch.')}, as"
                " quantised weights do: convert it to floating point first, scale applied."
            )
    if damaged := nonfinite(factors):
        raise ValueError(f"`{min(damaged)}` of adapter {number} of `adapters` holds a NaN or an infinity.")


def _same(name: str, models: Sequence[Mapping[str, Tensor]]) -> Tensor:
    if is_averaged(models[0][name]) and any(not torch.equal(models[0][name], model[name]) for model in models[1:]):
        raise ValueError(f"`{name}` is no factor of a LoRA layer, and has to be the same in all of `adapters`.")
    return carried(name, [model[name] for model in models])


def _truncated(down: Tensor, up: Tensor, rank: int | None) -> tuple[Tensor, Tensor]:
    """Factors of the same product of at most that rank, with the singular values shared out evenly."""
    if rank is None or rank >= len(down):
        return down, up
    left, inner = torch.linalg.qr(up.flatten(1))
    right, outer = torch.linalg.qr(down.flatten(1).T)
    u, s, v = torch.linalg.svd(inner @ outer.T, full_matrices=False)
    kept = s[:rank].sqrt()
    more = rank - len(kept)  # of a layer that is narrower than its rank
    a = pad((right @ v[:rank].T * kept).T, (0, 0, 0, more)).reshape(-1, *down.shape[1:])
    b = pad(left @ u[:, :rank] * kept, (0, more)).reshape(len(up), -1, *up.shape[2:])
    return a, b
