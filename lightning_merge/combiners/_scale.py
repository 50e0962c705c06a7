"""How far to go along the merged vector."""

from collections.abc import Mapping
from math import sqrt
from typing import Literal, TypeAlias

from lightning_merge._checks import instance, number
from lightning_merge.weights import State, Weights, scaled

Scale: TypeAlias = float | Literal["1/t", "1/sqrt(t)"]
"""A positive number, or one that shrinks with the number of tasks t merged so far, never of those still to come."""


def checked_scale(scale: Scale) -> Scale:
    """The scale, if it is one."""
    says = 'a number in (0, 10], "1/t" or "1/sqrt(t)"'
    if isinstance(scale, str | bool):
        if scale in ("1/t", "1/sqrt(t)"):
            return scale
        raise ValueError(f"`scale` must be {says}, got {scale!r}.")
    return number("scale", scale, "(0, 10]", says)


def scale_of(scale: Scale, tasks: int) -> float:
    """The number it stands for after so many tasks."""
    if scale == "1/t":
        return 1 / tasks
    if scale == "1/sqrt(t)":
        return 1 / sqrt(tasks)
    return float(scale)


def scaled_result(state: State, key: str, scale: Scale) -> Weights | None:
    """What the state keeps under the key, scaled for its updates: maybe as it is; ``None`` before the first."""
    return scaled(state[key], scale_of(scale, state["updates"])) if state["updates"] else None


def checked_weights(weights: Mapping[int | str, float]) -> Mapping[int | str, float]:
    """Positive factors by task.

    Raises:
        TypeError: If it is no mapping, or a factor is no number.
        ValueError: If a factor is not positive.
    """
    instance("weights", weights, Mapping, "a mapping from tasks to positive numbers")
    checked = {}
    for task, weight in weights.items():
        try:
            checked[task] = number("weights", weight, "(0, inf)", "positive numbers")
        except (TypeError, ValueError) as error:
            raise type(error)(f"{str(error).removesuffix('.')} for task {task}.") from None
    return checked
