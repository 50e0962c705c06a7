"""Reading a checkpoint file without running what is in it."""

import argparse
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lightning_merge.files._sharded import is_sharded_checkpoint, read_folder


class _Inert:
    """Stands for a class that a file names: takes the data, runs none of its code."""


# What timm and MMEngine put into their files besides tensors: data in a class that does nothing.
_PLAIN_DATA: list[Any] = [
    argparse.Namespace,
    (_Inert, "mmengine.logging.history_buffer.HistoryBuffer"),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "bool")),
    *(
        (np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct")  # NumPy 2 renamed the module
        for core in ("core", "_core")
    ),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read(path: Path, location: Literal["cpu", "meta"] = "cpu") -> Any:
    """The content of a file that torch wrote, on the CPU; tensors stay on disk until they are used, on "meta" for good.

    Raises:
        ValueError: If there is no such file, or it is cut short, not torch's, or holds more than plain data.
    """
    if is_sharded_checkpoint(path):
        return read_folder(path)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and not a sharded checkpoint: it lacks meta.pt and .metadata. Name a file, or a"
            " folder that a run under ModelParallelStrategy wrote."
        )
    if not path.is_file():
        near = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        cure = f" In {path.parent} there are: {', '.join(file.name for file in near)}." if near else ""
        raise ValueError(f"there is no file {path}.{cure}")
    try:
        with torch.serialization.safe_globals(_PLAIN_DATA):
            try:
                return torch.load(path, map_location=location, weights_only=True, mmap=True)
            except RuntimeError as error:
                if "mmap can only be used" not in str(error):
                    raise
                return torch.load(path, map_location=location, weights_only=True)  # torch's format before 1.6
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error) and "GLOBAL" not in str(error):
            raise ValueError(_unreadable(path)) from error
        raise ValueError(
            f"{path} holds Python objects{_which(error)} besides tensors and plain data, so reading it would run code."
            " If you trust whoever wrote it, convert it once:\n"
            f"  python -c \"import torch; x = torch.load('{path}', map_location='cpu', weights_only=False);"
            f" torch.save(getattr(x, 'state_dict', lambda: x['state_dict'])(), '{path.with_suffix('.weights.pt')}')\""
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(_unreadable(path)) from error


def _which(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""


def _unreadable(path: Path) -> str:
    return (
        f"{path} cannot be read: it was cut short (an interrupted save or copy), or torch did not write it."
        " Use an earlier checkpoint of the run."
    )
