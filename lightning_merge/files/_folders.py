"""Folders of models, as transformers, peft and diffusers write them, and models that are cut into several files."""

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from lightning_merge.files._other_formats import is_safetensors
from lightning_merge.files._read import read
from lightning_merge.files._safetensors import read_safetensors
from lightning_merge.weights import Weights

AVERAGE = "lightning_merge.pt"
"""Of a checkpoint of transformers: the raw weights, and the average that the model in the folder is of."""

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


class Config(NamedTuple):
    """What the settings of a folder say of the model in it.

    Args:
        architecture: The class of transformers; empty if it is not said.
        is_adapter: Whether it holds an adapter of peft.
        base: The model that the adapter is of; empty if it is not said.
    """

    architecture: str
    is_adapter: bool
    base: str


def config_of(folder: str | os.PathLike[str]) -> Config:
    """Reads the settings that ``save_pretrained`` wrote.

    Raises:
        ValueError: If there are none.
    """
    for name in ("adapter_config.json", "config.json"):
        try:
            found = json.loads((Path(folder) / name).read_text(encoding="utf-8"))
            architecture = (found.get("architectures") or [""])[0]
            return Config(str(architecture), name[0] == "a", str(found.get("base_model_name_or_path") or ""))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError, TypeError, LookupError) as error:
            raise ValueError(f"{Path(folder) / name} cannot be read as settings of a model: {error}") from error
    raise ValueError(
        f"{folder} is not a folder that `save_pretrained` wrote: it has neither config.json nor adapter_config.json."
    )


def class_of(config: Config, path: str) -> str:
    """The line that loads the model of a folder, whose path is given as Python reads it."""
    if config.is_adapter:
        base = f" of {config.base}" if config.base else ""
        return (
            f"from peft import PeftModel; model = PeftModel.from_pretrained(model, {path}), with the base model{base}"
        )
    name = config.architecture or "AutoModel"
    return f"from transformers import {name}; model = {name}.from_pretrained({path})"


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
