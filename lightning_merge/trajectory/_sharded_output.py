"""Checkpoints merged into a sharded one, a tensor at a time."""

import dataclasses
import io
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.state_dict_saver import save

from lightning_merge.files._lazy import Checkpoint
from lightning_merge.files._sharded_tensors import ShardedTensors
from lightning_merge.trajectory._trajectory import Trajectory


def save_parts(trajectory: Trajectory, coefficients: Sequence[float], folder: str | os.PathLike[str]) -> None:
    """Writes the parts of ``trajectory.combine(coefficients)``, laid out as the last checkpoint, which is sharded.

    All else in that one, as states of optimizers, is copied. In several processes each does its share of the tensors.
    Memory: one tensor of each checkpoint, and their merge.

    Args:
        trajectory: The checkpoints.
        coefficients: One per checkpoint.
        folder: Where to, on this machine.

    Raises:
        ValueError: As ``combine``, or if the last checkpoint is not sharded.
    """
    planner = _Merging(layout_of(trajectory), trajectory[0], trajectory.merging(coefficients))
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    # Without look-ahead, which is for copies from devices, nothing is merged before it is written.
    writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.distributed is disabled")  # as it is meant to be
            save({}, storage_writer=writer, planner=planner, no_dist=not distributed)
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from None


def layout_of(trajectory: Trajectory) -> ShardedTensors:
    """The tensors of the last checkpoint.

    Raises:
        ValueError: If it is not sharded.
    """
    last: Checkpoint = trajectory[-1]
    if last.sharded is None:
        raise ValueError(
            f"a folder is laid out as the last checkpoint, and {last.path} is no sharded one: name a file to write,"
            " ending in .ckpt or .pt."
        )
    return last.sharded


class _Merging(DefaultSavePlanner):
    """Plans to write what is in a folder, and gives merged tensors where those of the model are."""

    def __init__(self, layout: ShardedTensors, first: Checkpoint, merged: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._layout, self._first, self._merged = layout, first, merged
        self._last: tuple[str, Tensor] | None = None
        self._written = torch.empty(0)

    def create_local_plan(self) -> SavePlan:
        keys = self._shared_out()
        ways = self._layout.metadata.planner_data or {}
        items = [item for key in keys for item in self._items(key)]
        self.plan = SavePlan(items, planner_data={key: ways[key] for key in keys if key in ways})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        # Torch's writer writes one after the other, and yet holds on to all of a file until its end.
        self._written.untyped_storage().resize_(0)
        if write_item.tensor_data is None:
            return self._layout.bytes_of(write_item.index.fqn)
        self._written = self._part(write_item.index.fqn, write_item.tensor_data.chunk)
        return self._written

    def _part(self, key: str, chunk: ChunkStorageMetadata) -> Tensor:
        """A part of what is written under a key, in memory of its own."""
        if (name := self._layout.in_place.get(key)) is None:
            return self._layout.by_key(key, chunk)
        if self._last is None or self._last[0] != name:
            self._last = None  # its memory is free before that of the next is taken
            self._last = (name, self._merged(name))
        part = self._last[1]
        for dim, (start, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            part = part.narrow(dim, start, size)
        return part.clone(memory_format=torch.contiguous_format)

    def _shared_out(self) -> list[str]:
        """The keys that this process writes: tensors by size, each to whoever has least."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        world = torch.distributed.get_world_size() if distributed else 1
        rank = torch.distributed.get_rank() if distributed else 0
        shares: list[list[str]] = [[] for _ in range(world)]
        sizes = [0] * world
        numbers = {key: self._numbers(key) for key in self._layout.all_but_averages}
        for key in sorted(numbers, key=lambda key: -numbers[key]):
            least = sizes.index(min(sizes))
            shares[least].append(key)
            sizes[least] += numbers[key]
        return shares[rank]

    def _numbers(self, key: str) -> int:
        found = self._layout.metadata.state_dict_metadata[key]
        return found.size.numel() if isinstance(found, TensorStorageMetadata) else 1

    def _items(self, key: str) -> list[WriteItem]:
        found: Any = self._layout.metadata.state_dict_metadata[key]
        if not isinstance(found, TensorStorageMetadata):
            return [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO)]
        properties = found.properties
        if (name := self._layout.in_place.get(key)) is not None:
            properties = dataclasses.replace(properties, dtype=self._first.places[name].dtype)
        return [
            WriteItem(
                MetadataIndex(key, chunk.offsets),
                WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk, properties, found.size),
            )
            for chunk in found.chunks
        ]
