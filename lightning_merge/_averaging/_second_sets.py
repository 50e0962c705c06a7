"""Optimizers that keep the weights to evaluate apart from those they train."""

from typing import Any


def has_second_set(optimizer: Any) -> bool:
    """Whether it has modes, as schedule-free optimizers have."""
    return all(callable(getattr(type(optimizer), name, None)) for name in ("train", "eval"))
