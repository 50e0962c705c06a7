"""Where a window keeps its snapshots: on the device, in host memory, or on disk."""

import os
import pickle
import secrets
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TypeAlias

import torch

from lightning_merge.weights import Weights, average_dtype, clone, to_devices

Snapshot: TypeAlias = Weights | str
"""The tensors, or the name of the file that holds them."""

_HOST = torch.device("cpu")


class Snapshots(ABC):
    """A place for real copies of weights, in the precision averages are kept in."""

    cure: str
    """What to do when there is no room here."""

    @abstractmethod
    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        """What that many copies take: places in words, bytes needed there, and bytes free there if that is known."""

    @abstractmethod
    def keep(self, weights: Weights) -> Snapshot:
        """Makes a copy."""

    @abstractmethod
    def read(self, snapshot: Snapshot) -> Weights:
        """Its tensors; not to be written to."""

    @abstractmethod
    def extended(self, snapshot: Snapshot, weights: Weights) -> Snapshot:
        """The snapshot with copies of further tensors."""

    def drop(self, names: Iterable[str]) -> None:
        """Removes files that will not be read again."""
        return

    @abstractmethod
    def load(self, snapshots: list[Snapshot], devices: Mapping[str, torch.device]) -> list[Snapshot]:
        """Snapshots of a saved state, where they belong."""


class _InMemory(Snapshots):
    def read(self, snapshot: Snapshot) -> Weights:
        assert isinstance(snapshot, dict)
        return snapshot

    def extended(self, snapshot: Snapshot, weights: Weights) -> Snapshot:
        fresh = self.keep(weights)
        assert isinstance(fresh, dict)
        return {**self.read(snapshot), **fresh}

    def load(self, snapshots: list[Snapshot], devices: Mapping[str, torch.device]) -> list[Snapshot]:
        if any(isinstance(snapshot, str) for snapshot in snapshots):
            raise ValueError("the saved window is on disk: go on with `store='disk'` and its `directory`.")
        return [self._place(self.read(snapshot), devices) for snapshot in snapshots]

    @abstractmethod
    def _place(self, snapshot: Weights, devices: Mapping[str, torch.device]) -> Weights:
        """The snapshot where it belongs."""


class OnDevice(_InMemory):
    """Where the weights are."""

    cure = "Choose `store='cpu'` or `store='disk'`, or lower `k`."

    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        needed: dict[torch.device, int] = {}
        for tensor in weights.values():
            needed[tensor.device] = needed.get(tensor.device, 0) + copies * _size({"": tensor})
        return [(f"on {device}", size, free_bytes(device)) for device, size in needed.items()]

    def keep(self, weights: Weights) -> Weights:
        return clone(weights)

    def _place(self, snapshot: Weights, devices: Mapping[str, torch.device]) -> Weights:
        placed: Weights = to_devices(snapshot, devices)
        return placed


class OnHost(_InMemory):
    """In host memory."""

    cure = "Choose `store='disk'`, or lower `k`."

    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        return [("in host memory", copies * _size(weights), free_bytes(_HOST))]

    def keep(self, weights: Weights) -> Weights:
        # A bare `cpu()` of a tensor that is there already is the tensor itself: the "average" of those is the newest.
        return {name: t.detach().to(_HOST, average_dtype(t), copy=True) for name, t in weights.items()}

    def _place(self, snapshot: Weights, devices: Mapping[str, torch.device]) -> Weights:
        placed: Weights = to_devices(snapshot, _HOST)
        return placed


class OnDisk(Snapshots):
    """One file each, under a name that is never used twice: what a checkpoint names is there unchanged, or gone.

    Args:
        directory: Made if it does not exist. Runs may share it; each removes its own files only.
    """

    cure = "Choose a `directory` on a larger disk, or lower `k`."

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        self._directory.mkdir(parents=True, exist_ok=True)
        return [(f"in {self._directory}", copies * _size(weights), shutil.disk_usage(self._directory).free)]

    def keep(self, weights: Weights) -> str:
        return self._write(OnHost().keep(weights))

    def read(self, snapshot: Snapshot) -> Weights:
        path = self._path(snapshot)
        try:
            tensors: Weights = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except FileNotFoundError as error:
            raise self._gone([path]) from error
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"the snapshot {path} cannot be read: it was changed or damaged after it was written."
            ) from error
        return tensors

    def extended(self, snapshot: Snapshot, weights: Weights) -> str:
        return self._write({**self.read(snapshot), **OnHost().keep(weights)})

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            self._path(name).unlink(missing_ok=True)

    def load(self, snapshots: list[Snapshot], devices: Mapping[str, torch.device]) -> list[Snapshot]:
        if any(isinstance(snapshot, dict) for snapshot in snapshots):
            raise ValueError("the saved window is in memory: go on with `store='device'` or `store='cpu'`.")
        if gone := [path for path in map(self._path, snapshots) if not path.is_file()]:
            raise self._gone(gone)
        return list(snapshots)

    def _path(self, snapshot: Snapshot) -> Path:
        assert isinstance(snapshot, str)
        return self._directory / snapshot

    def _write(self, weights: Weights) -> str:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"{secrets.token_hex(8)}.pt"
        unfinished = self._directory / f"{name}.tmp"
        try:
            with unfinished.open("wb") as file:
                torch.save(weights, file)
                file.flush()
                os.fsync(file.fileno())
            unfinished.replace(self._directory / name)
        finally:
            unfinished.unlink(missing_ok=True)
        return name

    def _gone(self, paths: list[Path]) -> FileNotFoundError:
        return FileNotFoundError(
            f"{len(paths)} snapshots of the window are gone, the first is {paths[0]}. A window on disk keeps the files"
            " of its last two checkpoints: resume from one of those, put the files back, point `directory` to where"
            " they are now, or start a fresh average."
        )


def check_room(snapshots: Snapshots, weights: Weights, copies: int) -> None:
    """Raises before anything is allocated.

    Raises:
        MemoryError: If that many copies do not fit.
    """
    for place, needed, free in snapshots.room(weights, copies):
        if free is not None and needed > free:
            raise MemoryError(
                f"a window of {copies - 1} snapshots and one copy to work with needs {needed:,} bytes {place}, and"
                f" {free:,} are available. {snapshots.cure}"
            )


def _size(weights: Weights) -> int:
    """Bytes of one copy; of a sharded tensor the part that is here."""
    local = (t.to_local() if hasattr(t, "to_local") else t for t in weights.values())
    return sum(t.numel() * average_dtype(t).itemsize for t in local)


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; ``None`` where that cannot be known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None
