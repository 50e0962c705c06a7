"""What a module keeps outside parameters and buffers: counters, lists, memories, generators of random numbers."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, final

import torch
from torch import Tensor, nn

from lightning_merge._undo import position_of, shown, undo_of
from lightning_merge.weights import is_metric

_OF_TORCH = frozenset(vars(nn.Module()))
"""What every module has: parameters, buffers and children, which are put back elsewhere, and hooks."""

_MOST = 20_000
"""Objects that are looked at. What lies behind them in a large structure is left out."""


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
        elif (undo := undo_of(value)) is not None:
            self._undo.append(undo)
            for inner in _contents(value):
                self._take(inner, name)
        elif (position := position_of(value)) is not None:
            self._positions.append((name, position, position()))
        elif (own := _own_attributes(value)) is not None:
            if _is_of_a_library(type(value)) and not isinstance(value, _STEPPED):  # type: ignore[arg-type]
                self._positions.append((name, partial(shown, value), shown(value)))
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


def live_attributes(value: Any) -> dict[str, Any] | None:
    """The attributes of an object of the module's own, as they are kept; ``None`` if it is none or has no such dict."""
    others = (*_STATELESS, *_STEPPED, Tensor, nn.Module)
    if value is None or isinstance(value, others) or not hasattr(value, "__dict__"):
        return None
    kind: Any = type(value)
    return None if _own_attributes(value) is None or _is_of_a_library(kind) else vars(value)


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
