"""Reasons not to weigh models by the statistics that are given of them."""

import os
from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

from lightning_merge.diagnostics._examination import Finding
from lightning_merge.importance import Statistics

Given: TypeAlias = Mapping[str, Statistics | str | os.PathLike[str]]
"""Statistics, or the path of their file, by the name of the set of weights that they are said to be of."""


def of_importance(
    candidates: Mapping[str, Mapping[str, Tensor]], base: Mapping[str, Tensor] | None, statistics: Given
) -> list[Finding]:
    """What is wrong with statistics: all zero, a NaN, of another model, or of other weights, whose name is said."""
    found = []
    known = {**candidates, **({} if base is None else {"the base": base})}
    for name, given in statistics.items():
        try:
            opened = given if isinstance(given, Statistics) else Statistics.open(given)
            for each in opened.tensors:
                opened.find(each)
        except ValueError as error:
            found.append(Finding("statistics", 1.0, f"those of {name}: {error}"))
            continue
        if why := _unfit(opened, candidates[name]):
            found.append(Finding("statistics", 1.0, f"those of {name}: {opened.title} are of another model: {why}."))
        elif why := _differs(opened, candidates[name], name):
            others = [other for other, weights in known.items() if not _differs(opened, weights, other)]
            whose = f" They are those of {others[0]}." if others else ""
            found.append(Finding("statistics", 1.0, f"those of {name}: {why}{whose}"))
    return found


def _unfit(statistics: Statistics, weights: Mapping[str, Tensor]) -> str:
    for name, tensor in weights.items():
        try:
            shape = statistics.shape_of(name)
        except ValueError:
            return f"it has no `{name}`"
        if shape is not None and statistics.kind != "gram" and shape != tensor.shape:
            return f"of `{name}` they have shape {shape} instead of {tuple(tensor.shape)}"
    gone = next((name for name in statistics.tensors if name not in weights), None)
    return f"its `{gone}` is not in the weights" if gone is not None else ""


def _differs(statistics: Statistics, weights: Mapping[str, Tensor], where: str) -> str:
    try:
        statistics.refuse_other_weights(weights, where)
    except ValueError as error:
        return str(error)
    return ""
