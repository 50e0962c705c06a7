"""What may be built of a file without harm: tensors, and plain data of Python, torch and NumPy."""

import argparse
import codecs
import pickle
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_merge.files._stand_ins import StandIn


def _tensor_of_a_class(rebuild: Any, kind: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    """A tensor of a class of its own: as a plain one."""
    return call(rebuild, arguments)


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
PLAIN: dict[str, Any] = {
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
_CALLED = {id(value) for value in PLAIN.values()}


def builds_plain_data(function: Any) -> bool:
    """Whether calling it builds plain data."""
    return id(function) in _CALLED


def call(function: Any, arguments: Any) -> Any:
    """What a file calls is called if it builds plain data; what stands for anything else gives another stand-in.

    Raises:
        pickle.UnpicklingError: If it is neither.
    """
    if isinstance(function, StandIn):
        return StandIn(function.name)
    if not builds_plain_data(function):
        raise pickle.UnpicklingError(f"GLOBAL {function!r} is called, which is no plain data")
    return function(*arguments)
