"""Trim, elect sign, merge what agrees."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, final

import numpy as np
import torch
from torch import Tensor

from lightning_merge._checks import flag, number, one_of, settle
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.combiners._election import EXTREMES, Divisor, ZeroSign, additions, elected, majorities, signs
from lightning_merge.combiners._kept import as_in
from lightning_merge.combiners._ranked import largest
from lightning_merge.combiners._scale import Scale, checked_scale, checked_weights, scale_of
from lightning_merge.combiners._trim import PIECE, TopK, reaching, trim_count, trim_level
from lightning_merge.weights import (
    State,
    Weights,
    add_,
    array,
    average_dtype,
    in_threads,
    joined,
    maximum_,
    minimum_,
    on_host,
    rows,
    side_by_side,
    slices,
    stacked,
    unstacked,
)
from lightning_merge.weights import largest as largest_of

_MOST_IN_A_BYTE = 255

_REST = ("negative", "positives", "negatives", "votes", *EXTREMES)
"""What is kept beside the sum of positive values; all but the first not always."""


@final
@dataclass(frozen=True)
class TIES(Combiner):
    """Per parameter the mean of the trimmed values that have the elected sign.

    Each vector keeps its ``density`` largest magnitudes; the sign of a parameter is that of the sum of what was kept;
    ``scale * mean of the kept values of that sign`` is the result. Trimming needs one vector at a time, and sign and
    mean need the sums and counts of positive and of negative values, so the stream is exact in constant memory: two
    float32 and two one-byte numbers per parameter (four bytes each after 255 tasks), whatever the number of tasks.

    Args:
        density: Share of entries kept of each vector, in ``(0, 1]``.
        scale: In ``(0, 10]``, or shrinking with the number of tasks (``Sum``).
        scope: Whether entries are ranked within their ``"tensor"`` or over the whole vector (``"global"``, as in the
            official code).
        topk_rule: ``"exact"`` keeps ``density * size`` rounded down, at least one, of equal ones those that come first,
            tensors by name; ``"official_plus_one"`` keeps one more, and all that equal the last one.
        zero_sign: Where positive and negative values cancel, the result is zero (``"zero"``), or they count as
            ``"positive"`` (mergekit, PEFT), or as the majority of all other signs in the scope and without one as
            negative (``"official"``).
        divisor: What the sum of agreeing values is divided by: their ``"count"``, their ``"weight_sum"``, or nothing.
        disjoint: Whether the result is that ``"mean"``, or the ``"max"``: of the agreeing values, times their weights,
            the one furthest from zero, for which the stream keeps four float32 numbers per parameter; ``divisor`` has
            no part in it.
        weights: A positive factor for the vector of each task by its label; 1 for tasks not in it.
        weighted_sign: Whether the weights count in the election too (mergekit) or not (PEFT).

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> vectors = [{"w": torch.tensor(values)} for values in ([4.0, 1.0], [2.0, 1.0], [1.0, -5.0])]
        >>> TIES(density=0.5).combine(vectors)
        {'w': tensor([ 3., -5.])}

    References:
        Yadav et al., "TIES-merging: resolving interference when merging models", NeurIPS 2023, section 4.2.
    """

    density: float = 0.2
    scale: Scale = 1.0
    scope: Literal["tensor", "global"] = "tensor"
    topk_rule: TopK = "exact"
    zero_sign: ZeroSign = "zero"
    divisor: Divisor = "count"
    weights: Mapping[int | str, float] = field(default_factory=dict)
    weighted_sign: bool = True
    disjoint: Literal["mean", "max"] = "mean"

    def __post_init__(self) -> None:
        settle(self, density=number("density", self.density, "(0, 1]"))
        settle(self, scale=checked_scale(self.scale))
        for name, allowed in (
            ("scope", ("tensor", "global")),
            ("topk_rule", ("exact", "official_plus_one")),
            ("zero_sign", ("zero", "official", "positive")),
            ("divisor", ("count", "weight_sum", None)),
            ("disjoint", ("mean", "max")),
        ):
            one_of(name, getattr(self, name), allowed, f"one of {allowed}")
        settle(self, weights=checked_weights(self.weights))
        settle(self, weighted_sign=flag("weighted_sign", self.weighted_sign))

    @property
    def locality(self) -> Locality:
        return "model" if self.scope == "global" else "tensor"

    def init(self, like: Weights) -> State:
        def zeros(dtype: torch.dtype | None = None) -> Weights:
            return {
                name: torch.zeros(t.shape, dtype=average_dtype(t) if dtype is None else dtype, device=t.device)
                for name, t in like.items()
            }

        state: State = {"positive": zeros(), "negative": zeros()}
        if self.disjoint == "max":
            state |= {key: zeros() for key in EXTREMES}
        elif self.divisor is not None:
            dtype = torch.uint8 if self.divisor == "count" else torch.float32
            state |= {"positives": zeros(dtype), "negatives": zeros(dtype)}
        if not self.weighted_sign:
            state["votes"] = zeros()
        return {**state, "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        if state["updates"] == _MOST_IN_A_BYTE and self.divisor == "count" and self.disjoint == "mean":
            for key in ("positives", "negatives"):
                state[key] = {name: counts.int() for name, counts in state[key].items()}
        weight = self.weights.get(task, 1.0)
        if not on_host(vector):
            self._take_at_once(state, vector, weight)
        elif self.scope == "global":
            level = trim_level(list(vector.values()), self.density, self.topk_rule)
            for name in sorted(vector):  # the room for equal ones is given in an order that every source has
                level = self._add(state, name, vector, weight, level)
        else:
            in_threads(lambda name: self._add(state, name, vector, weight, self._level(vector[name])), vector)

    def _level(self, tensor: Tensor) -> tuple[float, int]:
        return trim_level([tensor], self.density, self.topk_rule)

    def _add(
        self, state: State, name: str, vector: Weights, weight: float, level: tuple[float, int]
    ) -> tuple[float, int]:
        """Takes in what reaches the level of one tensor; returns it with the room that is left for equal ones."""
        threshold, room = level
        into = {key: array(tensor.view(-1)) for key, tensor in _sums(state, name).items()}
        flat = array(vector[name].detach().to(state["positive"][name]).reshape(-1))
        for where in slices(len(flat), PIECE):
            new = flat[where]
            positive, negative, room = reaching(new, threshold, room)
            for key, addend in additions(new, positive, negative, weight, self.divisor == "count", into):
                if key in EXTREMES:
                    (np.maximum if key == "largest" else np.minimum)(into[key][where], addend, out=into[key][where])
                else:
                    # As bytes, since NumPy converts flags first.
                    into[key][where] += addend.view(np.uint8) if addend.dtype == bool else addend
        return threshold, room

    def _take_at_once(self, state: State, vector: Weights, weight: float) -> None:
        """``_take`` where operations on all tensors at once are what is fast."""
        vector = as_in(state["positive"], vector)
        groups = [side_by_side(vector)] if self.scope == "global" else list(stacked(vector))
        counts = [trim_count(self._ranked(vector, matrix), self.density, self.topk_rule) for _, matrix in groups]
        masks = largest([matrix for _, matrix in groups], counts, exact=self.topk_rule == "exact")
        for (names, matrix), mask in zip(groups, masks, strict=True):
            positive, negative = (sign & mask for sign in (matrix > 0, matrix < 0))
            for key, addend in additions(matrix, positive, negative, weight, self.divisor == "count", state):
                sums = {name: state[key][name] for name in names}
                new = unstacked(addend.to(next(iter(sums.values())).dtype), names, vector)
                _INTO.get(key, add_)(sums, new)

    def _ranked(self, vector: Weights, matrix: Tensor) -> int:
        """How many numbers are ranked in a row: tensors of zeros among others do not count."""
        if self.scope == "tensor" or self.topk_rule != "exact":
            return matrix.shape[1]
        return sum(vector[name].numel() for name, size in largest_of(vector).items() if size)

    @torch.no_grad()
    def _merged(self, state: State) -> Weights | None:
        if not state["updates"]:
            return None
        merged = dict(self._entries(state))
        return {name: merged[name] for name in state["positive"]}

    @torch.no_grad()
    def _last_result(self, state: State) -> Weights | None:
        merged = dict(state["positive"])  # their order
        for name, tensor in self._entries(state):
            merged[name] = tensor
            for group in state.values():
                if isinstance(group, dict):
                    del group[name]
        return merged

    def _entries(self, state: State) -> Iterator[tuple[str, Tensor]]:
        majority = None
        if self.zero_sign == "official" and self.scope == "global":
            majority = torch.stack([signs(_sums(state, name)).sum() for name in state["positive"]]).sum().sign()
        factor = scale_of(self.scale, state["updates"])
        like: Weights = dict(state["positive"])
        for names, positive in rows(like):
            kept = {"positive": positive, **{key: joined(state[key], names) for key in state if key in _REST}}
            if self.zero_sign == "official" and self.scope == "tensor":
                majority = majorities(kept)
            merged = torch.empty_like(positive)
            # On a CPU a piece at a time, which stays in the cache.
            for where in slices(positive.shape[1], PIECE) if on_host(like) else [slice(None)]:
                piece = {key: sums[:, where] for key, sums in kept.items()}
                torch.mul(elected(piece, self.zero_sign, self.divisor, majority), factor, out=merged[:, where])
            yield from unstacked(merged, names, like).items()


_INTO: dict[str, Callable[[Weights, Weights], None]] = {"largest": maximum_, "smallest": minimum_}


def _sums(state: State, name: str) -> Weights:
    """What is kept of one tensor, by key."""
    return {key: group[name] for key, group in state.items() if isinstance(group, dict)}
