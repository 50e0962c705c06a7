"""Tensors of a sharded checkpoint that stay on disk until they are asked for."""

import io
import pickle
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from lightning_merge.files._sharded import is_part, sharded_reader


class ShardedTensors(Mapping[str, Tensor]):
    """Whole tensors by name, put together of their parts when they are looked up.

    Memory: for each thread the tensor it has looked up last, and one part while that is read.

    Args:
        path: The folder, whose parts have been checked.
        keys: The key in the folder of each name.
        in_place: The name of each key of the set that a model is loaded from, which may be another one.
    """

    def __init__(self, path: Path, keys: Mapping[str, str], in_place: Mapping[str, str]) -> None:
        self._path, self._keys, self.in_place = path, dict(keys), dict(in_place)
        self._reader = sharded_reader(path)
        self.metadata: Metadata = self._reader.read_metadata()
        self._reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        self._last = threading.local()

    def __getitem__(self, name: str) -> Tensor:
        key = self._keys[name]
        if vars(self._last).get("key") != key:
            vars(self._last).clear()  # its memory is free before that of the next is taken
            vars(self._last).update(key=key, tensor=self.by_key(key))
        found: Tensor = self._last.tensor
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def all_but_averages(self) -> list[str]:
        """The keys of all that is in the folder, without tensors of averages."""
        return [key for key in self.metadata.state_dict_metadata if not is_part(key.partition(".")[2])]

    def by_key(self, key: str, part: ChunkStorageMetadata | None = None) -> Tensor:
        """What is under a key of the folder, or a part of it.

        Args:
            key: Of a tensor.
            part: Where it begins and how large it is; ``None``: all of it.
        """
        stored = self.metadata.state_dict_metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            raise TypeError(f"`{key}` is no tensor.")
        whole = ChunkStorageMetadata(torch.Size([0] * len(stored.size)), stored.size)
        target = torch.empty((part or whole).sizes, dtype=stored.properties.dtype)
        items = create_read_items_for_chunk_list(key, stored, [part or whole])
        try:
            self._reader.read_data(LoadPlan(items), _Into(target)).wait()
        except (RuntimeError, pickle.UnpicklingError, AssertionError, EOFError) as error:
            files = sorted({self._reader.storage_data[item.storage_index].relative_path for item in items})
            raise ValueError(
                f"the sharded checkpoint {self._path} is damaged: `{key}` cannot be read from {', '.join(files)}. Copy"
                " it again, or use an earlier checkpoint."
            ) from error
        return target

    def bytes_of(self, key: str) -> io.BytesIO:
        """What is under a key of the folder that is no tensor, as it was written."""
        index = MetadataIndex(key)
        none = torch.Size()
        item = ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none)
        found = _Into(torch.empty(0))
        self._reader.read_data(LoadPlan([item]), found).wait()
        return found.value


class _Into(DefaultLoadPlanner):
    """Puts what is read into one tensor, whatever it is called."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self._target = target
        self.value = io.BytesIO()

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.value = value

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        found = self._target
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            found = found.narrow(dim, start, size)
        return found

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is where it belongs."""
