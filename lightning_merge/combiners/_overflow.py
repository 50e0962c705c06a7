"""What is too large for its type once it is merged: found before it is written, or refused by name."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_merge.weights import State, Weights, all_below, is_averaged, largest, nonfinite

_MANY = 2.0**24
"""Vectors whose sum cannot be too large if each is this many times smaller than the largest number of its type."""


def has_room(kept: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> bool:
    """Whether a cheap bound proves a vector to be finite, and its sums with what is kept not to be too large."""
    return all_below(vector, min(map(_limit, kept.values()), default=math.inf) / _MANY)


def room_left(kept: Mapping[str, Tensor], vector: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors whose sums with a vector could be too large for the type they are kept in."""
    sizes = {name: size for name, size in largest(vector).items() if size > _limit(kept[name]) / _MANY}
    before = largest({name: kept[name] for name in sizes})
    return [name for name, size in sizes.items() if before[name] + size > _limit(kept[name])]


def widened(state: State, key: str, names: list[str]) -> list[str]:
    """Keeps sums of float32 in float64, whose mean may fit again; returns the names of those that are that already."""
    tensors: Weights = state[key]
    rest = [name for name in names if tensors[name].dtype != torch.float32 or tensors[name].device.type == "mps"]
    for name in names:
        if name not in rest:
            tensors[name] = tensors[name].double()
            state.setdefault("widened", []).append(name)
    return rest


def narrowed(weights: Weights, state: State) -> Weights:
    """The same with what was widened in float32 again."""
    back = state.get("widened", ())
    return {name: t.float() if name in back else t for name, t in weights.items()} if back else weights


def refuse_overflow(weights: Weights) -> Weights:
    """The weights, if all are finite: what went in was, so anything else is too large for its type."""
    if damaged := nonfinite(weights):
        first = next(name for name in weights if name in damaged)
        raise ValueError(
            f"`{first}` of the merged vector is too large for {weights[first].dtype}: hand the vectors in as float64,"
            " or lower the scale."
        )
    return weights


def _limit(tensor: Any) -> float:
    return float(torch.finfo(tensor.dtype).max) if is_averaged(tensor) else float("inf")
