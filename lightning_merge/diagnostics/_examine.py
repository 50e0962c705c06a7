"""The examination of sets of weights."""

from collections.abc import Callable, Mapping

from torch import Tensor

from lightning_merge._checks import function, instance, whole
from lightning_merge._mergeable import named
from lightning_merge.diagnostics import _reasons as reasons
from lightning_merge.diagnostics._barrier import on_the_line
from lightning_merge.diagnostics._examination import ORDER, Examination
from lightning_merge.diagnostics._importance import Given, of_importance
from lightning_merge.weights import Weights, first_mismatch

MOST_POINTS = 10_000
"""Points on a line between two sets of weights: each is measured."""


def examine(
    candidates: Mapping[str, Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None = None,
    *,
    loss: Callable[[Weights], float] | None = None,
    measure_statistics: Callable[[Weights], Weights] | None = None,
    initial_shares: Mapping[str, float] | None = None,
    points: int = 3,
    statistics: Given | None = None,
) -> Examination:
    """Looks for reasons not to merge sets of weights: two models, snapshots of a run, or its raw and merged weights.

    Args:
        candidates: Sets of weights by name, in the order they were trained where there is one; at least one.
        base: The weights that all of them were fine-tuned from, if they are to be merged as task vectors.
        loss: Measures a set of weights; without it barriers are not looked for.
        measure_statistics: BatchNorm statistics of a set of weights, from training data; empty without such layers.
            Where there is a loss, merged weights are measured with these.
        initial_shares: Share of an average that is still the weights of the start, by name.
        points: How many points between two sets the loss is measured at; at least 1.
        statistics: What ``Fisher``, ``RegMean`` and their kin would weigh candidates by, or its file, by name.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no candidate or ``statistics`` name one that is not there, if two are of different
            models, or if ``points`` is less than 1.

    Example:
        >>> import torch
        >>> near = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([1.0, 0.1])}}
        >>> examine(near).verdict
        'merge'
        >>> examine(near | {"c": {"w": torch.tensor([0.0, float("nan")])}}).verdict
        'not finite'
    """
    instance("candidates", candidates, Mapping, "sets of weights by name")
    for weights in candidates.values():
        named("candidates", weights)
    if not candidates:
        raise ValueError("`candidates` must hold at least one set of weights, got none.")
    if base is not None:
        named("base", base)
    for argument, given in (("loss", loss), ("measure_statistics", measure_statistics)):
        if given is not None:
            function(argument, given)
    if initial_shares is not None:
        instance("initial_shares", initial_shares, Mapping, "shares by name")
    if statistics is not None and set(instance("statistics", statistics, Mapping, "statistics by name")) - set(
        candidates
    ):
        raise ValueError(f"`statistics` must be of candidates, {list(candidates)}, got some of {list(statistics)}.")
    points = whole("points", points, 1, MOST_POINTS)
    first_name, first = next(iter(candidates.items()))
    for name, weights in [*candidates.items(), *([("the base", base)] if base is not None else [])]:
        if problem := first_mismatch(first, weights):
            raise ValueError(f"`{first_name}` and `{name}` are of different models: {problem}.")

    if broken := reasons.not_finite(candidates, base):
        return Examination((broken,), {"sets with NaN or infinity": broken.number}, {})
    measures: dict[str, float] = {}
    found = [
        *reasons.of_geometry(candidates, measures),
        *reasons.of_base(candidates, base, measures),
        *reasons.of_start(initial_shares or {}, measures),
        *of_importance(candidates, base, statistics or {}),
    ]
    line: dict[float, float] = {}
    found += reasons.of_statistics(candidates, measure_statistics, measures)
    if loss is not None and len(candidates) > 1:
        line, rise = on_the_line(candidates, loss, measure_statistics, points, measures)
        found += rise
    return Examination(tuple(sorted(found, key=lambda finding: ORDER.index(finding.problem))), measures, line)
