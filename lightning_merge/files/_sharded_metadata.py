"""The description of a sharded checkpoint, which torch would unpickle whatever it says."""

import pickle
from enum import Enum
from pathlib import Path
from typing import Any

import torch


class _OfCheckpoints(pickle.Unpickler):
    """Takes the classes that torch describes a sharded checkpoint with, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == "builtins.getattr":
            return _member  # Python 3.11 looks members of enumerations up by it
        described = module in _DESCRIBED and "." not in name and isinstance(super().find_class(module, name), type)
        plain = f"{module}.{name}" in _PLAIN_NAMES or (module.partition(".")[0] == "pathlib" and name.endswith("Path"))
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), (torch.dtype, torch.layout))
        if not (described or plain or is_dtype):
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return super().find_class(module, name)


def _member(kind: Any, name: str) -> Any:
    if not (isinstance(kind, type) and issubclass(kind, Enum)):
        raise pickle.UnpicklingError("GLOBAL builtins.getattr")
    return kind[name]


_DESCRIBED = {
    *(f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "storage", "planner")),
    "torch.distributed._shard.sharded_tensor.metadata",
    "torch.distributed._shard.metadata",
}


_PLAIN_NAMES = {
    "torch.Size",
    "torch.device",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    "collections.defaultdict",
    "builtins.dict",
    "builtins.list",
    "builtins.set",
}


def refuse_code(metadata: Path) -> None:
    """Raises if the description of a sharded checkpoint is more than that: torch unpickles whatever it says."""
    try:
        with metadata.open("rb") as file:
            _OfCheckpoints(file).load()
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):
            raise ValueError(
                f"{metadata} names {str(error).removeprefix('GLOBAL ')}, which is none of the classes that describe a"
                " sharded checkpoint with, so reading it would run code. Something else wrote it."
            ) from error
    except Exception:  # damaged: what reads it next says so
        return
