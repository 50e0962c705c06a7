"""Lengths and angles of sets of weights: of all parameters taken as one vector, in float64."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from lightning_merge._checks import number
from lightning_merge._mergeable import named, several_named
from lightning_merge.weights import Weights, average_dtype, first_mismatch, is_averaged

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def parameters(weights: Mapping[str, Tensor]) -> Weights:
    """What lengths and angles are about: floating-point tensors without the statistics of BatchNorm layers.

    Args:
        weights: Weights by name.
    """
    named("weights", weights)
    return {name: t for name, t in weights.items() if is_averaged(t) and name.rpartition(".")[2] not in _STATISTICS}


@torch.no_grad()
def dot(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Sum of the products of all parameters, in float64.

    Args:
        left: Weights by name.
        right: Weights of the same names and shapes.
    """
    kept = parameters(_alike(left, right))
    return sum(float(torch.sum(wide(t) * wide(right[name]))) for name, t in kept.items())


def norm(weights: Mapping[str, Tensor]) -> float:
    """Euclidean length of all parameters.

    Args:
        weights: Weights by name.

    Example:
        >>> norm({"w": torch.tensor([3.0, 4.0]), "bn.running_mean": torch.tensor([100.0])})
        5.0
    """
    named("weights", weights)
    return math.sqrt(dot(weights, weights))


def distance(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Euclidean length of the difference of all parameters.

    Args:
        left: Weights by name.
        right: Weights of the same names and shapes.

    Example:
        >>> distance({"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([4.0, 5.0])})
        5.0
    """
    return norm(difference(left, right))


def cosine(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> float:
    """Cosine of the angle between two sets of weights; 0 if one of them is all zeros.

    Args:
        left: Weights by name.
        right: Weights of the same names and shapes.

    Example:
        >>> cosine({"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0])})
        0.7071067811865475
    """
    _alike(left, right)
    lengths = norm(left) * norm(right)
    return dot(left, right) / lengths if lengths else 0.0


@torch.no_grad()
def difference(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Weights:
    """``left - right`` of all parameters, in float64.

    Args:
        left: Weights by name.
        right: Weights of the same names and shapes.

    Raises:
        TypeError: If they are not named tensors.
        ValueError: If names or shapes differ.
    """
    return {name: wide(t) - wide(right[name]) for name, t in parameters(_alike(left, right)).items()}


def successive_cosines(path: Sequence[Mapping[str, Tensor]]) -> list[float]:
    """Cosines of each step along a path of weights with the step before it.

    About 1: the path still goes somewhere, and an average of it lags behind. About -0.5: independent noise around one
    point, which is what averaging removes.

    Args:
        path: Sets of weights of the same names and shapes, in the order of time.

    Example:
        >>> successive_cosines([{"w": torch.tensor([x])} for x in (0.0, 1.0, 3.0, 2.0)])
        [1.0, -1.0]
    """
    steps = [difference(after, before) for before, after in pairwise(several_named("path", path))]
    return [cosine(before, after) for before, after in pairwise(steps)]


@torch.no_grad()
def sign_conflicts(vectors: Sequence[Mapping[str, Tensor]]) -> float:
    """Share of the entries that at least two vectors move, where not all of these move it the same way.

    Args:
        vectors: Task vectors of the same names and shapes.

    Example:
        >>> sign_conflicts([{"w": torch.tensor([1.0, 1.0, 0.0])}, {"w": torch.tensor([2.0, -1.0, 5.0])}])
        0.5
    """
    vectors = several_named("vectors", vectors)
    if not vectors:
        raise ValueError("`vectors` must hold at least one vector, got none.")
    counts = [conflicts(vectors, name) for name in parameters(vectors[0])]
    shared = sum(moved for _, moved in counts)
    return sum(opposed for opposed, _ in counts) / shared if shared else 0.0


def conflicts(vectors: Sequence[Mapping[str, Tensor]], name: str) -> tuple[int, int]:
    """How many entries of a tensor vectors move against each other, and how many at least two move."""
    signs = torch.stack([torch.sign(_real(vector[name])) for vector in vectors])
    moved = signs.abs().sum(0)
    opposed = (moved >= 2) & (signs.sum(0).abs() < moved)
    return int(opposed.sum()), int((moved >= 2).sum())


def _real(tensor: Tensor) -> Tensor:
    """Its real and its imaginary parts, which have signs of their own, if it is complex."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@torch.no_grad()
def between(left: Mapping[str, Tensor], right: Mapping[str, Tensor], share: float) -> Weights:
    """``(1 - share) * left + share * right``, in the precision of ``left``; integers are those of the nearer end.

    Args:
        left: Weights by name.
        right: Weights of the same names and shapes.
        share: Share of ``right``; outside [0, 1] it lies beyond the ends.

    Example:
        >>> between({"w": torch.tensor(0.0)}, {"w": torch.tensor(4.0)}, 0.25)
        {'w': tensor(1.)}
    """
    _alike(left, right)
    share = number("share", share)
    nearer = left if share < 0.5 else right
    return {
        name: torch.lerp(_average(t), _average(right[name]).to(t.device), share).to(t.dtype)
        if is_averaged(t)
        else nearer[name]
        for name, t in left.items()
    }


def mean(candidates: Sequence[Mapping[str, Tensor]]) -> Weights:
    """The uniform mean, in the precision of the first; integer tensors are those of the last.

    Args:
        candidates: Sets of weights of the same names and shapes; at least one.
    """
    candidates = several_named("candidates", candidates)
    if not candidates:
        raise ValueError("`candidates` must hold at least one set of weights, got none.")
    result: Weights = dict(candidates[0])
    for count, weights in enumerate(candidates[1:], start=2):
        result = between(result, weights, 1 / count) | {n: t for n, t in weights.items() if not is_averaged(t)}
    return result


def _alike(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """The left ones, if the right ones have all of their parameters."""
    kept = parameters(named("left", left))
    found = {name: t for name, t in named("right", right).items() if name in kept}
    if problem := first_mismatch(kept, found):
        raise ValueError(f"`right` is of another model than `left`: {problem}.")
    return left


def matrices(weights: Mapping[str, Tensor]) -> Weights:
    """Without biases and scales: those of any two networks are alike."""
    return {name: t for name, t in parameters(weights).items() if t.dim() > 1}


def wide(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.detach().to("cpu", torch.float64)


def _average(tensor: Tensor) -> Tensor:
    return tensor.detach().to(average_dtype(tensor))
