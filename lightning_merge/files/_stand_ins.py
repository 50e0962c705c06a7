"""An unpickler that builds tensors and plain data, and something that does nothing in the place of everything else.

It is handed to ``torch.load`` for files that hold objects of classes which are not plain data, such as a network among
``hyper_parameters``. Nothing is imported by a name in the file, and nothing is called but what rebuilds tensors.
"""

import _compat_pickle
import argparse
import codecs
import pickle
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn, final

import numpy as np
import torch
from torch import Tensor

_REFUSED_MODULES = {"os", "posix", "nt", "sys", "subprocess"}
_REFUSED = {f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__", "open")}


@final
class StandIn(dict[Any, Any]):
    """What a file holds of an object of a class that is not plain data; its items, if it was a kind of dict.

    Args:
        name: The class or function that the file names.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.data: list[Any] = []

    def __repr__(self) -> str:
        return f"<stands for {self.name}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise pickle.PicklingError(f"{self.name} was not read, so that it cannot be written.")

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


def stands_for(value: Any) -> str | None:
    """The first class of which something stands in a value, or in what the value holds."""
    waiting, seen = [value], {id(value)}  # what a value holds may hold the value
    while waiting:
        value = waiting.pop()
        if isinstance(value, StandIn):
            return value.name
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, _HOLDERS) else ()
        fresh = [part for part in parts if id(part) not in seen]
        seen.update(map(id, fresh))
        waiting.extend(reversed(fresh))
    return None


_HOLDERS = (list, tuple, set, frozenset)


def _tensor_of_a_class(rebuild: Any, kind: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    """A tensor of a class of its own: as a plain one."""
    return _call(rebuild, arguments)


def _parameter(tensor: Tensor, requires_grad: bool, hooks: Any, state: Any = None) -> Any:
    if isinstance(tensor, StandIn):
        return tensor
    return torch.nn.Parameter(tensor, requires_grad)


def _array_functions() -> dict[str, Any]:
    """What NumPy's arrays and numbers are rebuilt with, under the names of NumPy 1 and 2."""
    found: dict[str, Any] = {"numpy.ndarray": np.ndarray, "numpy.dtype": np.dtype}
    for core in ("core", "_core"):
        found[f"numpy.{core}.multiarray._reconstruct"] = np.empty(0).__reduce__()[0]
        found[f"numpy.{core}.multiarray.scalar"] = np.float64(0).__reduce__()[0]
    for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "bool"):
        dtype: Any = type(np.dtype(kind))
        found[f"{dtype.__module__}.{dtype.__qualname__}"] = dtype
    return found


_REBUILD = ("tensor", "tensor_v2", "tensor_v3", "qtensor", "sparse_tensor", "meta_tensor_no_storage")
_PLAIN: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "collections.Counter": Counter,
    "argparse.Namespace": argparse.Namespace,
    **{f"builtins.{kind.__name__}": kind for kind in (set, frozenset, dict, list, tuple, bytearray, complex, slice)},
    **{f"builtins.{kind.__name__}": kind for kind in (int, float, str, bool, bytes)},
    "_codecs.encode": codecs.encode,
    "torch.Size": torch.Size,
    "torch.device": torch.device,
    "torch.UntypedStorage": torch.UntypedStorage,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    **{f"torch._utils._rebuild_{name}": f for name in _REBUILD if (f := getattr(torch._utils, f"_rebuild_{name}", 0))},
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_parameter_with_state": _parameter,
    "torch._tensor._rebuild_from_type_v2": _tensor_of_a_class,
    **_array_functions(),
}
_CALLED = {id(value) for value in _PLAIN.values()}
_BUILT = (OrderedDict, argparse.Namespace, np.ndarray)


def _call(function: Any, arguments: Any) -> Any:
    if isinstance(function, StandIn):
        return StandIn(function.name)
    if id(function) not in _CALLED:
        raise pickle.UnpicklingError(f"GLOBAL {function!r} is called, which is no plain data")
    return function(*arguments)


_Base: Any = pickle._Unpickler  # in Python, so that what each instruction does can be replaced


class Unpickler(_Base):  # type: ignore[misc]
    """Builds plain data and stand-ins."""

    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    def find_class(self, module: str, name: str) -> Any:
        """What a name in the file stands for; imports nothing."""
        module, name = _compat_pickle.NAME_MAPPING.get((module, name), (module, name))
        module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        full = f"{module}.{name}"
        if module.partition(".")[0] in _REFUSED_MODULES or full in _REFUSED:
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {full} runs code")
        if full in _PLAIN:
            return _PLAIN[full]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return StandIn(full)

    def get_extension(self, code: int) -> NoReturn:
        """Refuses: these come from what the process has registered."""
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL extension {code}")

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.stack.append(_call(klass, args))

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = _call(self.stack[-1], arguments)

    def _new(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self._made(kind, arguments)

    def _new_with_names(self) -> None:
        self.stack.pop()
        self._new()

    def _made(self, kind: Any, arguments: Any) -> None:
        if not isinstance(kind, StandIn) and not (isinstance(kind, type) and id(kind) in _CALLED):
            raise pickle.UnpicklingError(f"GLOBAL {kind!r} is no plain data")
        made = StandIn(kind.name) if isinstance(kind, StandIn) else kind.__new__(kind, *arguments)
        self.stack.append(made)

    def _build(self) -> None:
        state = self.stack.pop()
        built: Any = self.stack[-1]
        if isinstance(built, StandIn):
            return
        if type(built) not in _BUILT and not isinstance(built, np.dtype):
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL {type(built).__name__} is given attributes")
        if type(built) in (OrderedDict, argparse.Namespace):
            vars(built).update(state)
        else:
            built.__setstate__(state)

    def _append(self) -> None:
        value = self.stack.pop()
        self._list().append(value)

    def _appends(self) -> None:
        values = self.pop_mark()
        self._list().extend(values)

    def _list(self) -> Any:
        extended = self.stack[-1]
        if not isinstance(extended, (list, StandIn)):
            raise pickle.UnpicklingError(f"{type(extended).__name__} is no list")
        return extended.data if isinstance(extended, StandIn) else extended

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._dict()[key] = value

    def _set_items(self) -> None:
        values = self.pop_mark()
        self._dict().update(zip(values[::2], values[1::2], strict=True))

    def _dict(self) -> Any:
        filled = self.stack[-1]
        if not isinstance(filled, dict):
            raise pickle.UnpicklingError(f"{type(filled).__name__} is no dict")
        return filled

    def _add_items(self) -> None:
        values = self.pop_mark()
        if type(self.stack[-1]) is set:
            self.stack[-1].update(values)

    dispatch: ClassVar[dict[int, Callable[..., None]]] = {
        **_Base.dispatch,
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new,
        pickle.NEWOBJ_EX[0]: _new_with_names,
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.ADDITEMS[0]: _add_items,
    }


def load(file: Any, **settings: Any) -> Any:
    """As ``pickle.load``."""
    return Unpickler(file, **settings).load()
