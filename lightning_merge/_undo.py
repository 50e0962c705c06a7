"""What puts a value back to how it is now, and what tells how far one is that cannot be put back."""

import io
import random
from array import array
from collections import deque
from collections.abc import Callable
from functools import partial
from types import GeneratorType
from typing import Any

import numpy as np
import torch

_LARGE = 2**26
"""Bytes of an array from which only a sum is kept of it."""


def undo_of(value: Any) -> Callable[[], object] | None:
    """What puts a container or a generator of random numbers back to how it is now; ``None`` for anything else."""
    if isinstance(value, dict | list | set | deque | bytearray | array):
        return _undo_container(value)
    if isinstance(value, tuple | frozenset):
        return _nothing
    if isinstance(value, np.ndarray) and value.nbytes <= _LARGE and not value.dtype.hasobject:
        kept = value.copy()
        return lambda: None if np.array_equal(value, kept) else np.copyto(value, kept)
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if isinstance(value, np.random.RandomState):
        return partial(value.set_state, value.get_state())
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, torch.Generator):
        return partial(value.set_state, value.get_state())
    return None


def _nothing() -> None:
    """For what cannot change itself."""


def _undo_container(value: Any) -> Callable[[], None]:
    if isinstance(value, bytearray | array):
        whole: Any = value[:]
        return lambda: None if value == whole else value.__setitem__(slice(None), whole)
    kept = list(value.items()) if isinstance(value, dict) else list(value)

    def undo() -> None:
        now = list(value.items()) if isinstance(value, dict) else list(value)
        if _are_the_same(now, kept):
            return
        value.clear()
        if isinstance(value, dict):
            for key, item in kept:
                value[key] = item  # not `update`, which adds up in a Counter
        elif isinstance(value, set):
            value.update(kept)
        else:
            value.extend(kept)

    return undo


def _are_the_same(left: list[Any], right: list[Any]) -> bool:
    """Whether two lists hold the same objects; pairs of a dict's items are made anew each time."""
    if len(left) != len(right):
        return False
    return all(
        a is b or (type(a) is tuple is type(b) and len(a) == len(b) == 2 and a[0] is b[0] and a[1] is b[1])
        for a, b in zip(left, right, strict=True)
    )


def position_of(value: Any) -> Callable[[], Any] | None:
    """What tells how far an iterator or a file is, or what a large array holds."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return lambda: float(np.sum(value, dtype=np.float64)) if value.dtype.kind in "fiub" else None
    if isinstance(value, GeneratorType):
        return lambda: _frame_of(value)
    if isinstance(value, io.IOBase):
        return lambda: None if value.closed or not value.seekable() else value.tell()
    if hasattr(value, "__next__"):
        return lambda: shown(value)
    return None


def _frame_of(generator: Any) -> Any:
    frame = generator.gi_frame
    if frame is None:
        return None
    return frame.f_lasti, {name: shown(value) for name, value in frame.f_locals.items()}


def shown(value: Any) -> Any:
    if isinstance(value, enumerate | zip | map | filter):
        return [shown(part) for part in value.__reduce__()[1]]  # what they go on from
    if hasattr(value, "__length_hint__"):
        return value.__length_hint__()
    numbers = {key: item for key, item in getattr(value, "__dict__", {}).items() if isinstance(item, int | float)}
    return numbers or (value if isinstance(value, int | float | str) else type(value).__name__ and repr(value))
