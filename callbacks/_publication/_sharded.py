"""How tensors of which each process holds a part get into a checkpoint and out of it."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_merge import weights
from lightning_merge._ranks import is_first
from lightning_merge.files._label import KEY
from lightning_merge.files._sharded import fill, is_sharded_checkpoint, mergeable, read_tensors
from lightning_merge.files._write import is_remote
from lightning_merge.shards import as_sharded, map_named, part_of
from lightning_merge.weights import is_sharded


def for_file(nested: Any, sharded: Mapping[str, Tensor], state_dict: Mapping[str, Any]) -> Any:
    """Nested tensors as a checkpoint with such a ``state_dict`` holds them, made of what is here of each.

    All processes must call this if it is to be one file: the first one gets whole tensors, one after the other.
    """
    if not sharded:
        return nested
    in_parts = any(isinstance(value, Tensor) and is_sharded(value) for value in state_dict.values())

    def convert(name: str, part: Tensor) -> Tensor:
        like: Any = sharded.get(name)
        if like is None or part.shape != like.to_local().shape:
            return part
        tensor = as_sharded(part, like)
        return tensor if in_parts else _whole(tensor)

    return map_named(convert, nested)


def pack(section: dict[str, Any], sharded: Mapping[str, Tensor], checkpoint: dict[str, Any]) -> None:
    """Brings the raw weights and the rules' states of a section into the form that the checkpoint needs.

    That is whole tensors, or parts and their names in the section. The strategy writes parts of a ``state_dict``, which
    a plain module must be able to load, and of optimizer states: theirs go in as those of a further optimizer.
    """
    parts: dict[str, Tensor] = {}

    def move(name: str, tensor: Tensor) -> Tensor | str:
        if not is_sharded(tensor):
            return tensor
        key = f"{KEY}/{len(parts)}/{name}"
        parts[key] = tensor
        return key

    for holder, key in mergeable(section):
        holder[key] = map_named(move, for_file(holder[key], sharded, checkpoint["state_dict"]))
    if parts:
        checkpoint["optimizer_states"] = [*checkpoint.get("optimizer_states", ()), parts]


def unpack(section: dict[str, Any], sharded: Mapping[str, Tensor], path: Path) -> None:
    """Undoes ``pack``: every tensor becomes the part that belongs here, whatever wrote the file or folder."""

    def make(key: str, size: torch.Size, dtype: torch.dtype) -> Tensor:
        like: Any = sharded.get(key.split("/", 2)[2])
        if like is None:
            return torch.empty(size, dtype=dtype)
        return as_sharded(torch.empty_like(like.to_local(), dtype=dtype), like)

    def convert(name: str, tensor: Tensor) -> Tensor:
        like: Any = sharded.get(name)
        is_whole = like is not None and tensor.shape == like.shape != like.to_local().shape
        return part_of(tensor, like) if is_whole else tensor

    if path.is_dir():
        fill(section, weights.local(read_tensors(path, make, ours_alone=True)))
    for holder, key in mergeable(section):
        holder[key] = map_named(convert, holder[key])


def _whole(tensor: Any) -> Tensor:
    whole: Tensor = tensor.full_tensor()
    return whole.cpu() if dist.get_rank() == 0 else whole.new_empty(0)


def make_room(path: str, strategy: Any) -> None:
    """Takes away a sharded checkpoint of an earlier run, into which Lightning would put the new file. All call this.

    Raises:
        ValueError: If another folder is there.
    """
    if strategy.restore_checkpoint_after_setup or is_remote(path) or not Path(path).is_dir():
        return  # a strategy that shards does so itself
    if not is_sharded_checkpoint(Path(path)):
        raise ValueError(f"{path} is a folder, where a checkpoint was to be written.")
    if is_first():
        shutil.rmtree(path)
