"""Snapshots in files, and the locks that tell those of a run that goes on from what a killed one left."""

import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from lightning_merge.files._read import read
from lightning_merge.files._write import atomic
from lightning_merge.rules._snapshots import OnHost, Snapshot, Snapshots
from lightning_merge.weights import Weights, size_of

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


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
        return [(f"in {self._directory}", copies * size_of(weights), shutil.disk_usage(self._directory).free)]

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
