"""Where a window keeps its snapshots: on the device, in host memory, or on disk."""

import os
import re
import secrets
import shutil
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

import torch

from lightning_merge.files._read import read
from lightning_merge.files._write import atomic
from lightning_merge.weights import Weights, average_dtype, clone, to_devices

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

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
    def keep(self, weights: Weights, beside: Iterable[Snapshot] = ()) -> Snapshot:
        """Makes a copy, of the same run as the snapshots it will be beside."""

    @abstractmethod
    def read(self, snapshot: Snapshot) -> Weights:
        """Its tensors; not to be written to."""

    @abstractmethod
    def extended(self, snapshot: Snapshot, weights: Weights) -> Snapshot:
        """The snapshot with copies of further tensors."""

    def drop(self, names: Iterable[str]) -> None:
        """Removes files that will not be read again."""
        return

    def name(self, snapshots: Iterable[Snapshot]) -> None:
        """Called when a checkpoint names snapshots: they are kept whatever happens to the run."""
        return

    @abstractmethod
    def load(
        self, snapshots: list[Snapshot], devices: Mapping[str, torch.device], named: Iterable[Snapshot] = ()
    ) -> list[Snapshot]:
        """Snapshots of a saved state, where they belong; ``named`` are others that the checkpoint names."""


class _InMemory(Snapshots):
    def read(self, snapshot: Snapshot) -> Weights:
        assert isinstance(snapshot, dict)
        return snapshot

    def extended(self, snapshot: Snapshot, weights: Weights) -> Snapshot:
        fresh = self.keep(weights)
        assert isinstance(fresh, dict)
        return {**self.read(snapshot), **fresh}

    def load(
        self, snapshots: list[Snapshot], devices: Mapping[str, torch.device], named: Iterable[Snapshot] = ()
    ) -> list[Snapshot]:
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

    def keep(self, weights: Weights, beside: Iterable[Snapshot] = ()) -> Weights:
        return clone(weights)

    def _place(self, snapshot: Weights, devices: Mapping[str, torch.device]) -> Weights:
        placed: Weights = to_devices(snapshot, devices)
        return placed


class OnHost(_InMemory):
    """In host memory."""

    cure = "Choose `store='disk'`, or lower `k`."

    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        return [("in host memory", copies * _size(weights), free_bytes(_HOST))]

    def keep(self, weights: Weights, beside: Iterable[Snapshot] = ()) -> Weights:
        # A bare `cpu()` of a tensor that is there already is the tensor itself: the "average" of those is the newest.
        return {name: t.detach().to(_HOST, average_dtype(t), copy=True) for name, t in weights.items()}

    def _place(self, snapshot: Weights, devices: Mapping[str, torch.device]) -> Weights:
        placed: Weights = to_devices(snapshot, _HOST)
        return placed


class OnDisk(Snapshots):
    """One file each, under a name that is never used twice: what a checkpoint names is there unchanged, or gone.

    A name is ``RUN-NUMBER.pt``, both 16 hexadecimal digits; a run that goes on from a checkpoint has the ``RUN`` of the
    one that wrote it. From the moment that a checkpoint names a file it is read-only; before, the process that will
    read it holds a lock on it. So a file of a run that nobody named and nobody locks was left by a process that was
    killed, and goes when the run goes on. Where there are no locks (Windows, some network file systems) it stays.

    Args:
        directory: Made if it does not exist. Runs may share it; each removes its own files only.
    """

    cure = "Choose a `directory` on a larger disk, or lower `k`."

    def __init__(self, directory: str) -> None:
        self._directory = Path(directory)

    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        self._directory.mkdir(parents=True, exist_ok=True)
        return [(f"in {self._directory}", copies * _size(weights), shutil.disk_usage(self._directory).free)]

    def keep(self, weights: Weights, beside: Iterable[Snapshot] = ()) -> str:
        return self._write(OnHost().keep(weights), _run_of(beside))

    def read(self, snapshot: Snapshot) -> Weights:
        path = self._path(snapshot)
        if not path.is_file():
            raise self._gone([path])
        try:
            tensors: Weights = read(path)
        except ValueError as error:
            raise ValueError(
                f"the snapshot {path} cannot be read: it was changed or damaged after it was written."
            ) from error
        return tensors

    def extended(self, snapshot: Snapshot, weights: Weights) -> str:
        return self._write({**self.read(snapshot), **OnHost().keep(weights)}, _run_of([snapshot]))

    def drop(self, names: Iterable[str]) -> None:
        for path in [self._path(name) for name in names]:
            _remove(path)

    def name(self, snapshots: Iterable[Snapshot]) -> None:
        for path in map(self._path, snapshots):
            if path.is_file():
                path.chmod(path.stat().st_mode & ~_WRITE)
                _unlock(path)

    def load(
        self, snapshots: list[Snapshot], devices: Mapping[str, torch.device], named: Iterable[Snapshot] = ()
    ) -> list[Snapshot]:
        if any(isinstance(snapshot, dict) for snapshot in snapshots):
            raise ValueError("the saved window is in memory: go on with `store='device'` or `store='cpu'`.")
        paths, others = [self._path(snapshot) for snapshot in snapshots], [self._path(name) for name in named]
        if gone := [path for path in paths if not path.is_file()]:
            raise self._gone(gone)
        if snapshots:
            self._remove_leftovers(_run_of(snapshots), {*paths, *others})
        return list(snapshots)

    def _path(self, snapshot: Snapshot) -> Path:
        """Where a file is. A name out of a checkpoint is data: it leads to no other folder, and to no other file."""
        if not isinstance(snapshot, str) or not _NAME.fullmatch(snapshot):
            raise ValueError(
                f"a window on disk has files called as `0123456789abcdef-0123456789abcdef.pt` in its `directory`, and"
                f" the checkpoint names {snapshot!r}. It was changed after it was written: use another one."
            )
        return self._directory / snapshot

    def _write(self, weights: Weights, run: str) -> str:
        self._directory.mkdir(parents=True, exist_ok=True)
        name = f"{run}-{secrets.token_hex(8)}.pt"
        path = self._directory / name
        with atomic(path) as file:
            _lock(path, file)
            torch.save(weights, file)
        return name

    def _remove_leftovers(self, run: str, named: set[Path]) -> None:
        for path in self._directory.glob(f"{run}-*"):
            is_ours = _NAME.fullmatch(path.name) or path.name.endswith(".tmp")
            if is_ours and path not in named and os.path.abspath(path) not in _locks and _is_leftover(path):
                _remove(path)

    def _gone(self, paths: list[Path]) -> FileNotFoundError:
        return FileNotFoundError(
            f"{len(paths)} snapshots of the window are gone, the first is {paths[0]}. A window on disk keeps the files"
            " of its last two checkpoints: resume from one of those, put the files back, point `directory` to where"
            " they are now, or start a fresh average."
        )


_NAME = re.compile(r"[0-9a-f]{16}(-[0-9a-f]{16})?\.pt")
_WRITE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH

_MOST_LOCKS = 128  # of a process; those of windows that nobody reads any more are the oldest

_locks: dict[str, int] = {}  # handles of files of this process that no checkpoint has named


def _run_of(snapshots: Iterable[Snapshot]) -> str:
    """The run that wrote the snapshots; a new one if there are none."""
    names = [snapshot for snapshot in snapshots if isinstance(snapshot, str)]
    return names[-1][:16] if names else secrets.token_hex(8)


def _lock(path: Path, file: IO[bytes]) -> None:
    """Holds a lock until the file is removed or the process ends, however it ends."""
    if fcntl is None:
        return
    handle = os.dup(file.fileno())
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return
    _locks[os.path.abspath(path)] = handle
    if len(_locks) > _MOST_LOCKS:
        os.close(_locks.pop(next(iter(_locks))))


def _unlock(path: Path) -> None:
    if (handle := _locks.pop(os.path.abspath(path), None)) is not None:
        os.close(handle)


def _is_leftover(path: Path) -> bool:
    """Whether neither a checkpoint has named it nor a process holds it."""
    if fcntl is None:
        return False
    try:
        with path.open("rb+") as file:  # fails if it is read-only, unless for root
            if not os.fstat(file.fileno()).st_mode & stat.S_IWUSR:
                return False
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove(path: Path) -> None:
    _unlock(path)
    if fcntl is None and path.is_file():
        path.chmod(path.stat().st_mode | stat.S_IWUSR)  # Windows removes no file that is read-only
    path.unlink(missing_ok=True)


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
