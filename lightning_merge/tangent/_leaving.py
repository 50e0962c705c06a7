"""What leaves a pass that carries values and what they change by: the change is lost where it is not added before."""

from collections import deque
from collections.abc import Iterable, Iterator, MutableMapping
from dataclasses import is_dataclass
from typing import Any

import torch.autograd.forward_ad as forward_mode
from torch import Tensor, nn

_OF_MODULES = frozenset(vars(nn.Module()))


def leaving(result: Any, module: nn.Module) -> Any:
    """The result, and what the pass left in attributes of the module and its submodules, as plain values.

    Raises:
        TypeError: If the result is a generator, which would run after the pass.
    """
    seen: set[int] = set()
    for part in module.modules():
        for key, value in vars(part).items():
            if key not in _OF_MODULES and (isinstance(value, (Tensor, list, tuple, dict)) or is_dataclass(value)):
                vars(part)[key] = _plain(value, seen)
    return _plain(result, seen)


def _plain(value: Any, seen: set[int]) -> Any:
    """Tensors anew, containers and objects in place."""
    if isinstance(value, Tensor):
        primal, change = forward_mode.unpack_dual(value)  # type: ignore[no-untyped-call]
        return value if change is None else primal + change
    if isinstance(value, Iterator):
        raise TypeError(f"A {type(value).__name__} of results would run after the pass that is linear: return a list.")
    if isinstance(value, (nn.Module, type)) or id(value) in seen:
        return value
    seen.add(id(value))
    if isinstance(value, tuple):
        items = [_plain(each, seen) for each in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return value._make(items) if hasattr(value, "_make") else type(value)(items)
    if isinstance(value, (list, deque)):
        _renew(value, enumerate(value), seen)
    elif isinstance(value, MutableMapping):
        _renew(value, value.items(), seen)
    for key in (*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())):
        old = getattr(value, key, None) if isinstance(key, str) else None
        if (new := _plain(old, seen)) is not old:
            object.__setattr__(value, key, new)
    return value


def _renew(container: Any, items: Iterable[tuple[Any, Any]], seen: set[int]) -> None:
    for key, old in list(items):
        if (new := _plain(old, seen)) is not old:
            container[key] = new
