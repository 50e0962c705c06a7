"""An unpickler that builds tensors and plain data, and something that does nothing in the place of everything else.

It is handed to ``torch.load`` for files that hold objects of classes which are not plain data, such as a network among
``hyper_parameters``. Nothing is imported by a name in the file, and nothing is called but what rebuilds tensors.
"""

import _compat_pickle
import argparse
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, ClassVar, NoReturn

import numpy as np
import torch

from lightning_merge.files._plain_data import PLAIN, builds_plain_data, call
from lightning_merge.files._stand_ins import StandIn

_REFUSED_MODULES = {"os", "posix", "nt", "sys", "subprocess"}
_REFUSED = {f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__", "open")}
_BUILT = (OrderedDict, argparse.Namespace, np.ndarray)

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
        if full in PLAIN:
            return PLAIN[full]
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        return StandIn(full)

    def get_extension(self, code: int) -> NoReturn:
        """Refuses: these come from what the process has registered."""
        raise pickle.UnpicklingError(f"Unsupported global: GLOBAL extension {code}")

    def _instantiate(self, klass: Any, args: Any) -> None:
        self.stack.append(call(klass, args))

    def _reduce(self) -> None:
        arguments = self.stack.pop()
        self.stack[-1] = call(self.stack[-1], arguments)

    def _new(self) -> None:
        arguments, kind = self.stack.pop(), self.stack.pop()
        self._made(kind, arguments)

    def _new_with_names(self) -> None:
        self.stack.pop()
        self._new()

    def _made(self, kind: Any, arguments: Any) -> None:
        if not isinstance(kind, StandIn) and not (isinstance(kind, type) and builds_plain_data(kind)):
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
