"""Folders of models, as transformers, peft and diffusers write them, and models that are cut into several files."""

import json
import os
from pathlib import Path
from typing import Any

from lightning_merge.files._other_formats import is_safetensors
from lightning_merge.files._read import read
from lightning_merge.files._safetensors import read_safetensors
from lightning_merge.weights import Weights

_INDEX = (".safetensors.index.json", ".bin.index.json", ".pt.index.json")
_STEMS = {
    "adapter_model": "peft",
    "model": "transformers",
    "pytorch_model": "transformers",
    "diffusion_pytorch_model": "diffusers",
    "open_clip_model": "open_clip",
    "open_clip_pytorch_model": "open_clip",
}
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


def is_index(path: str | os.PathLike[str]) -> bool:
    """Whether a file lists the parts that a model is cut into."""
    return os.fspath(path).endswith(_INDEX)


def model_file(folder: Path) -> tuple[Path, str]:
    """The file or index of a folder that holds a model, and which library calls it so.

    Raises:
        ValueError: If there is none, or not one alone; what can be named is listed.
    """
    for stem, library in _STEMS.items():
        for suffix in (*_INDEX, *_SUFFIXES):
            if (found := folder / f"{stem}{suffix}").is_file():
                return found, library
    inside = sorted(path for path in folder.iterdir() if _may_hold_weights(path))
    if len(inside) == 1 and inside[0].is_file():
        return inside[0], "weights"
    cure = f"Name one of them: {', '.join(path.name for path in inside[:12])}" if inside else "Name a file with weights"
    raise ValueError(
        f"{folder} is a folder with {'several models or checkpoints' if inside else 'no weights'} in it, and no sharded"
        f" checkpoint (it lacks meta.pt and .metadata). {cure}."
    )


def _may_hold_weights(path: Path) -> bool:
    if path.is_file():
        return path.suffix in _SUFFIXES or is_index(path)
    if not path.is_dir():
        return False
    return (path / ".metadata").exists() or any(
        (path / f"{stem}{suffix}").exists() for stem in _STEMS for suffix in (*_INDEX, *_SUFFIXES)
    )


def parts_of(index: Path) -> list[Path]:
    """The files that an index lists.

    Raises:
        ValueError: If it is no index, or a file is missing.
    """
    files = [index.parent / name for name in dict.fromkeys(_listed(index).values())]
    if lacking := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{index} is an index of shards, of which there is no {', '.join(lacking)}: copy all of them.")
    return files


def read_parts(index: Path, check: bool = True) -> Weights:
    """The tensors of all files that an index lists, as one set.

    Raises:
        ValueError: If it is no index, a file is missing or cannot be read, or lacks a tensor.
    """
    listed, weights = _listed(index), dict[str, Any]()
    for file in parts_of(index):
        weights |= read_safetensors(file) if is_safetensors(file) else read(file, check=check)
    for name, shard in listed.items():
        if name not in weights:
            raise ValueError(f"{index.parent / shard} is not that of {index}: it lacks `{name}`.")
    return {name: weights[name] for name in listed}


def _listed(index: Path) -> dict[str, str]:
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        if all(isinstance(name, str) and Path(file).name == file for name, file in found.items()):
            return dict(found)
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{index} is no index of shards: it has no `weight_map` of tensors to files beside it.")
