"""What a module keeps outside parameters and buffers: counters, lists, memories, generators of random numbers."""

import io
import random
import sys
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, GeneratorType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from lightning_merge.weights import is_metric

_OF_TORCH = frozenset(vars(nn.Module()))
"""What every module has: parameters, buffers and children, which are put back elsewhere, and hooks."""

_MOST = 20_000
"""Objects that are looked at. What lies behind them in a large structure is left out."""

_LARGE = 2**26
"""Bytes of an array from which only a sum is kept of it."""

_STATELESS = (type, FunctionType, BuiltinFunctionType, MethodType, ModuleType, str, bytes, int, float, complex)
_STEPPED = (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
"""Of a library, but what a step does to them is known: their state is in plain attributes."""

_NOT_OF_THE_MODULE = {"Trainer", "Fabric", "Dataset", "DataLoader", "LightningDataModule", "Logger"}
_WITH_THREADS = {"threading", "_thread", "queue", "_queue", "multiprocessing", "concurrent", "asyncio", "socket"}
_LIBRARIES = {"torch", "lightning", "pytorch_lightning", "lightning_merge", "lightning_fabric", "omegaconf", "logging"}


@final
class Attributes:
    """The plain attributes of a module and of all below it, with what lies in their containers and objects.

    Containers are remembered by a copy of what is in them, objects by their attributes, generators of random numbers
    by their state. Of iterators, open files and objects of other people's libraries only a change can be seen. What
    threads of its own work on is left alone, and so are trainers, data sets, and loggers.

    Args:
        module: Whose attributes.

    Attributes:
        modules: The module, all below it, and those that it keeps in attributes where torch does not see them.
        tensors: The tensors among its attributes. Their values are not copied here.
    """

    def __init__(self, module: nn.Module) -> None:
        self.modules: list[nn.Module] = []
        self.tensors: list[Tensor] = []
        self._seen: dict[int, Any] = {}  # by id; it also keeps what is replaced from being given the same one
        self._undo: list[Callable[[], object]] = []
        self._positions: list[tuple[str, Callable[[], Any], Any]] = []
        self._take_module(module, "")

    def restore(self) -> list[str]:
        """Puts everything back; the names of attributes that were changed and cannot be."""
        for undo in reversed(self._undo):
            undo()
        return sorted({name for name, position, before in self._positions if position() != before})

    def _take_module(self, module: nn.Module, prefix: str) -> None:
        for name, each in module.named_modules(prefix=prefix):
            if id(each) in self._seen:
                continue
            self._seen[id(each)] = each
            self.modules.append(each)
            if isinstance(each, torch.jit.ScriptModule) or is_metric(each):
                continue
            own = {key: value for key, value in vars(each).items() if key not in _OF_TORCH}
            self._undo.append(partial(_put_back_attributes, vars(each), own, _OF_TORCH))
            for key, value in own.items():
                self._take(value, f"{name}.{key}" if name else key)

    def _take(self, value: Any, name: str) -> None:
        if value is None or isinstance(value, _STATELESS) or id(value) in self._seen or len(self._seen) > _MOST:
            return
        if isinstance(value, nn.Module):
            self._take_module(value, name)
            return
        self._seen[id(value)] = value
        if isinstance(value, Tensor):
            self.tensors.append(value)
        elif (undo := _undo_of(value)) is not None:
            self._undo.append(undo)
            for inner in _contents(value):
                self._take(inner, name)
        elif (position := _position_of(value)) is not None:
            self._positions.append((name, position, position()))
        elif (own := _own_attributes(value)) is not None:
            if _is_of_a_library(type(value)) and not isinstance(value, _STEPPED):  # type: ignore[arg-type]
                self._positions.append((name, partial(_shown, value), _shown(value)))
                return
            self._undo.append(partial(_put_back_object, value, own))
            for inner in own.values():
                self._take(inner, name)


def _put_back_attributes(live: Any, saved: dict[str, Any], others: Iterable[str] = ()) -> None:
    for name in live.keys() - saved.keys() - set(others):
        del live[name]
    for name, value in saved.items():
        if live.get(name, live) is not value:
            live[name] = value


def _put_back_object(live: Any, saved: dict[str, Any]) -> None:
    kind: Any = type(live)
    slots = _slots(kind)
    if hasattr(live, "__dict__"):
        _put_back_attributes(vars(live), {name: value for name, value in saved.items() if name not in slots})
    for name, slot in slots.items():
        if getattr(live, name, slot) is not saved.get(name, slot):
            slot.__set__(live, saved[name]) if name in saved else slot.__delete__(live)


def _contents(value: Any) -> Iterator[Any]:
    if not hasattr(value, "__len__") or len(value) > _MOST:
        return
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list | tuple | set | frozenset | deque):
        yield from value


def _undo_of(value: Any) -> Callable[[], object] | None:
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


def _position_of(value: Any) -> Callable[[], Any] | None:
    """What tells how far an iterator or a file is, or what a large array holds."""
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        return lambda: float(np.sum(value, dtype=np.float64)) if value.dtype.kind in "fiub" else None
    if isinstance(value, GeneratorType):
        return lambda: _frame_of(value)
    if isinstance(value, io.IOBase):
        return lambda: None if value.closed or not value.seekable() else value.tell()
    if hasattr(value, "__next__"):
        return lambda: _shown(value)
    return None


def _frame_of(generator: Any) -> Any:
    frame = generator.gi_frame
    if frame is None:
        return None
    return frame.f_lasti, {name: _shown(value) for name, value in frame.f_locals.items()}


def _shown(value: Any) -> Any:
    if isinstance(value, enumerate | zip | map | filter):
        return [_shown(part) for part in value.__reduce__()[1]]  # what they go on from
    if hasattr(value, "__length_hint__"):
        return value.__length_hint__()
    numbers = {key: item for key, item in getattr(value, "__dict__", {}).items() if isinstance(item, int | float)}
    return numbers or (value if isinstance(value, int | float | str) else type(value).__name__ and repr(value))


def _own_attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object that the module keeps; ``None`` if it is not the module's to keep."""
    kind: Any = type(value)
    slots, own = _slots(kind), getattr(value, "__dict__", {})
    if not isinstance(own, dict) or not (slots or hasattr(value, "__dict__")) or isinstance(value, BaseException):
        return None
    own = {**own, **{name: getattr(value, name) for name in slots if hasattr(value, name)}}
    if isinstance(value, _STEPPED):
        return own
    if _package(kind) in _LIBRARIES | _WITH_THREADS or _NOT_OF_THE_MODULE & {cls.__name__ for cls in kind.__mro__}:
        return None
    # What other threads work on must not be put back under their hands.
    return None if any(_package(type(each)) in _WITH_THREADS for each in own.values()) else own


@cache
def _slots(kind: Any) -> dict[str, Any]:
    """What reads and writes each attribute for which a class has a slot, by name."""
    written = [vars(cls) for cls in reversed(kind.__mro__) if "__slots__" in vars(cls)]
    return {name: slot for own in written for name, slot in own.items() if isinstance(slot, MemberDescriptorType)}


def _package(kind: type) -> str:
    return kind.__module__.partition(".")[0]


@cache
def _is_of_a_library(kind: Any) -> bool:
    """Whether its class was installed: only it knows what its attributes mean together."""
    file = getattr(sys.modules.get(kind.__module__), "__file__", None) or ""
    return bool({"site-packages", "dist-packages"} & set(Path(file).parts))
