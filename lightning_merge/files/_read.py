"""The one reader of checkpoint files: nothing in them is run, and an error says what is the matter with which file."""

import argparse
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from lightning_merge.files import _unpickler
from lightning_merge.files._check import check_sums, is_of_the_system, is_zip, naming, opened
from lightning_merge.files._other_formats import is_safetensors
from lightning_merge.files._refusals import runs_code, unreadable
from lightning_merge.files._sharded import is_sharded_checkpoint, read_folder
from lightning_merge.files._stand_ins import StandIn
from lightning_merge.files._write import is_remote

Location = Literal["cpu", "meta"]


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


def read(path: str | os.PathLike[str], location: Location = "cpu", check: bool = True) -> Any:
    """The content of a file that torch wrote, on the CPU; tensors stay on disk until they are used, on "meta" for good.

    Objects of classes that are not plain data are stand-ins (``StandIn``): nothing of them is imported or run.

    Args:
        path: A file, the folder of a sharded checkpoint, or a URL.
        location: "meta" for names and shapes alone.
        check: Hold tensors on the CPU against the checksums in the file, which reads all of it once.

    Raises:
        ValueError: If there is no such file, or it is damaged, cut short, not torch's, or would run code.
        OSError: If the system refuses to read it.
    """
    with naming(path):
        if not is_remote(path):
            path = Path(path)
            if is_sharded_checkpoint(path):
                return read_folder(path, read, {} if location == "meta" else None)
            refuse_no_file(path)
        _refuse_program(path)
        check_sums(path, tensors=check and location == "cpu")
        try:
            content = _load(path, location)
        except pickle.UnpicklingError as error:
            if "Unsupported global" in str(error) or "GLOBAL" in str(error):
                raise ValueError(runs_code(path, _which(error))) from error
            raise ValueError(unreadable(path)) from error
        except (OSError, MemoryError):
            raise
        except Exception as error:
            if is_of_the_system(error):
                raise
            raise ValueError(unreadable(path)) from error
    if isinstance(content, StandIn) and not content:
        raise ValueError(runs_code(path, f" ({content.name})"))
    return content


def is_plain(path: str | os.PathLike[str]) -> bool:
    """Whether ``torch.load(path, weights_only=True)`` reads a sound file, by trying it; reads no numbers."""
    if is_remote(path):
        return False
    if is_safetensors(path):
        return True
    try:
        _torch_load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError:
        return False
    return True


def _load(path: str | os.PathLike[str], location: Location) -> Any:
    """Tensors and plain data as torch reads them by itself; with stand-ins for the rest where that does not do."""
    try:
        with torch.serialization.safe_globals(_PLAIN_DATA):
            return _torch_load(path, location, weights_only=True)
    except pickle.UnpicklingError:
        if not _is_zip(path) or os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0") != "0":
            raise
    # Not a way around `weights_only`: torch then takes the unpickler that it is given, and this one runs nothing.
    return _torch_load(path, location, weights_only=False, pickle_module=_unpickler)


def _torch_load(path: str | os.PathLike[str], location: Location, **how: Any) -> Any:
    if is_remote(path):
        with opened(path) as file:
            return torch.load(file, map_location=location, **how)
    try:
        return torch.load(path, map_location=location, mmap=True, **how)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        return torch.load(path, map_location=location, **how)  # torch's format before 1.6


def _is_zip(path: str | os.PathLike[str]) -> bool:
    with opened(path) as file:
        return is_zip(file)


def _refuse_program(path: str | os.PathLike[str]) -> None:
    """Raises if it is an archive of TorchScript, which is a program and no file of weights."""
    with opened(path) as file:
        if not is_zip(file):
            return
        try:
            with zipfile.ZipFile(file) as parts:
                names = parts.namelist()
        except (zipfile.BadZipFile, ValueError, OSError):  # what checks the file says so
            return
    if any(name.partition("/")[2] == "constants.pkl" for name in names):
        raise ValueError(
            f"{path} is a program (TorchScript), which is not read since that would run it. If you trust who wrote it:"
            f" torch.save(torch.jit.load({os.fspath(path)!r}).state_dict(), 'weights.pt')."
        )


def refuse_no_file(path: Path) -> None:
    """Raises if there is nothing to read.

    Raises:
        ValueError: If it is a folder or missing; what lies beside it is named.
    """
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder, and not a sharded checkpoint: it lacks meta.pt and .metadata. Name a file in it."
        )
    if not path.is_file():
        near = sorted(file for file in path.parent.glob("*.ckpt") if file.is_file()) if path.parent.is_dir() else []
        cure = f" In {path.parent} there are: {', '.join(file.name for file in near)}." if near else ""
        if path.is_symlink():
            raise ValueError(f"{path} is a link to {os.readlink(path)}, where there is no file.{cure}")
        if path.exists():
            raise ValueError(f"{path} is a pipe, a socket or a device, not a file.{cure}")
        raise ValueError(f"there is no file {path}.{cure}")
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{os.fsencode(path)!r} is no text in UTF-8, so torch cannot open it: rename it.") from error


def _which(error: Exception) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", str(error))
    return f" ({found[1]})" if found else ""
