"""Sharded checkpoints: folders that ``torch.distributed.checkpoint`` writes, each process its parts of tensors.

Lightning puts ``state_dict`` and optimizer states there, and what the first process knows besides into ``meta.pt``. Our
tensors are in ``state_dict`` too, under names of their own that nobody else asks for, and ``meta.pt`` has those names.
"""

import pickle
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from lightning_merge.files._label import KEY
from lightning_merge.files._sharded_metadata import refuse_code

_META = "meta.pt"
_PREFIX = "state_dict."


def is_sharded_checkpoint(path: Path) -> bool:
    """Whether it is such a folder, or what is left of one."""
    return path.is_dir() and ((path / _META).exists() or (path / ".metadata").exists())


def check_parts(path: Path, needed: tuple[str, ...] = (".metadata", _META)) -> None:
    """Raises before anything is read.

    Args:
        path: The folder.
        needed: Files that describe it; what ``.metadata`` lists is needed besides.

    Raises:
        ValueError: If files of a sharded checkpoint are missing or cut short.
    """
    expected = dict.fromkeys((path / name for name in needed), 1)
    if (path / ".metadata").is_file():
        refuse_code(path / ".metadata")
        try:
            stored_parts = _reader(path).read_metadata().storage_data.values()
        except (EOFError, pickle.UnpicklingError):
            stored_parts = ()
            expected[path / ".metadata"] = (path / ".metadata").stat().st_size + 1
        for stored in stored_parts:
            file = path / stored.relative_path
            expected[file] = max(expected.get(file, 0), stored.offset + stored.length)
    wrong = [file for file, size in expected.items() if not file.is_file() or file.stat().st_size < size]
    if wrong:
        names = ", ".join(sorted(file.name for file in wrong))
        raise ValueError(
            f"the sharded checkpoint {path} lacks parts, or they were cut short: {names}. An interrupted save or copy"
            " does that: copy the folders of all machines into one, or use an earlier checkpoint."
        )


def read_folder(path: Path, load: Callable[[Path], Any]) -> dict[str, Any]:
    """The content of a sharded checkpoint as that of a checkpoint in one file, without optimizer states.

    In one process and in host memory.

    Args:
        path: The folder.
        load: Reads ``meta.pt``.

    Raises:
        ValueError: If parts are missing, or ``.metadata`` would run code.
    """
    if not (path / _META).exists() and (found := _without_lightning(path)) is not None:
        return found
    check_parts(path)
    content: dict[str, Any] = load(path / _META)
    tensors = read_tensors(path, lambda name, size, dtype: torch.empty(size, dtype=dtype))
    content["state_dict"] = {name: t for name, t in tensors.items() if not name.startswith(f"{KEY}/")}
    if KEY in content:
        fill(content[KEY], tensors)
    return content


def _without_lightning(path: Path) -> dict[str, Any] | None:
    """The tensors that ``torch.distributed.checkpoint`` alone saved, nested as they were; ``None`` if it is ours."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    check_parts(path, (".metadata",))
    metadata = _reader(path).read_metadata()
    if any(key.startswith(f"{_PREFIX}{KEY}/") for key in metadata.state_dict_metadata):
        return None
    ways = metadata.planner_data or {}  # of each key how it was nested
    targets = {
        key: torch.empty(stored.size, dtype=stored.properties.dtype)
        for key, stored in metadata.state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata) and not key.startswith(("optim", "state.optim"))
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.distributed is disabled")  # as it is meant to be
        if targets:
            load(targets, storage_reader=_reader(path), no_dist=True)
    content: dict[str, Any] = {}
    for key, tensor in targets.items():
        *outer, last = ways.get(key, (key,))
        inside = content
        for step in outer:
            inside = inside.setdefault(step, {})
        inside[last] = tensor
    return content


def read_tensors(path: Path, make: Any, only: str = "") -> dict[str, Any]:
    """Tensors of ``state_dict`` whose name begins with ``only``, read into what ``make(name, size, dtype)`` gives.

    With several processes all must call this.
    """
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    targets = {
        key: make(key.removeprefix(_PREFIX), stored.size, stored.properties.dtype)
        for key, stored in _reader(path).read_metadata().state_dict_metadata.items()
        if key.startswith(_PREFIX + only) and isinstance(stored, TensorStorageMetadata)
    }
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if targets:
        load(targets, storage_reader=_reader(path), no_dist=not distributed)
    return {key.removeprefix(_PREFIX): tensor for key, tensor in targets.items()}


def fill(section: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Puts tensors in the place of their names."""
    for holder, key in mergeable(section):
        holder[key] = tree_map(lambda leaf: tensors.get(leaf, leaf) if isinstance(leaf, str) else leaf, holder[key])


def mergeable(section: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """Where in a section tensors of merged parameters are: not among kept batches, whose names are the user's."""
    if "states" in section:
        yield section, "raw"
        for state in section["states"].values():
            if "state" in state:
                yield state, "state"


def _reader(path: Path) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    return FileSystemReader(path)
