"""The sets of weights that a checkpoint holds, whichever library wrote it, under the names of a plain module."""

import os
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge.files._folders import is_index, model_file, read_parts
from lightning_merge.files._foreign_layouts import LAYOUTS
from lightning_merge.files._foreign_layouts import of_lightning as of_lightning
from lightning_merge.files._generic_layouts import Location, file_of
from lightning_merge.files._other_formats import is_safetensors
from lightning_merge.files._read import read
from lightning_merge.files._refusals import runs_code
from lightning_merge.files._safetensors import read_safetensors
from lightning_merge.files._sets import WeightFile, stored
from lightning_merge.files._sharded import is_sharded_checkpoint, together
from lightning_merge.files._stand_ins import stands_for
from lightning_merge.files._write import is_remote


def open_file(path: Location, check: bool = True) -> WeightFile:
    """The sets of a file of lightning-merge, Lightning, timm, ema-pytorch, NeMo, MMEngine, torch or safetensors.

    Args:
        path: A file, the index of a model in shards, the folder of a sharded checkpoint, of transformers, peft or
            diffusers, or a URL.
        check: As for ``read``.

    Raises:
        ValueError: If the file cannot be read or holds no weights.
        OSError: If the system refuses to read it.
    """
    if not is_remote(path):
        path = Path(path)
        if is_index(path):
            return file_of(
                path, "an index of shards", {"weights": stored(read_parts(path, check), "in its shards")}, None
            )
        if path.is_dir() and not is_sharded_checkpoint(path):
            inside, library = model_file(path)
            return replace(open_file(inside, check), path=path, kind=f"a folder of {library} with {inside.name}")
    if is_safetensors(path):
        sets = {"weights": stored(read_safetensors(path), "the whole file")}
        return file_of(path, "a safetensors file", sets, None)
    return sets_of(read(path, check=check), path)


def sets_of(content: Any, path: Location) -> WeightFile:
    """The sets in the content of a file.

    Raises:
        ValueError: If it holds no weights, or is laid out like a file of a library and yet is none.
    """
    if isinstance(content, Mapping):
        content = together(content)
        for recognise in LAYOUTS:
            try:
                found = recognise(content, path)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                kind = recognise.__name__.strip("_").replace("_", " ")
                raise ValueError(
                    f"{path} looks like a file of {kind}, and is not as that writes it ({error!r}). It was changed"
                    " after it was written, or is damaged: use another checkpoint."
                ) from error
            if found is not None:
                return found
    raise ValueError(no_weights(content, path))


def no_weights(content: Any, path: Location) -> str:
    """What is said of a file in which no set was found, with the cure where one is known."""
    entries = content.items() if isinstance(content, Mapping) else ()
    if (kind := next((kind for _, value in entries if (kind := stands_for(value)) is not None), None)) is not None:
        return runs_code(path, f" ({kind})")
    for key, value in entries:
        if isinstance(value, list) and value and all(isinstance(each, Tensor) for each in value):
            return (
                f"{path} holds tensors without names, in `{key}`, as torch_ema and EMAModel of diffusers write them:"
                " load them with that into the model, and save its `state_dict()`."
            )
    return (
        f"{path} holds no weights that could be found: no `state_dict`, and no tensors by name."
        f" `lightning-merge inspect {shlex.quote(os.fspath(path))}` lists what is in it."
    )


def open_set(text: str) -> tuple[WeightFile, str]:
    """A file and one of its sets from ``FILE`` or ``FILE:SET``.

    Raises:
        ValueError: As ``open_file``, or if the file holds no such set.
    """
    name, chosen = named_set(text)
    file = open_file(name)
    if chosen is None:
        return file, file.default
    file.choose(chosen)
    return file, chosen


def named_set(text: str) -> tuple[str, str | None]:
    """The file and the set that ``FILE`` or ``FILE:SET`` names, which is ``None`` if it names none."""
    name, separator, chosen = text.rpartition(":")
    has_set = separator and not Path(text).exists() and Path(name).exists()
    if is_remote(text):
        has_set = is_remote(name) and "/" not in chosen
    return (name, chosen) if has_set else (text, None)
