"""Whether a checkpoint is as it was written."""

import errno
import os
import re
import stat
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch

from lightning_merge.files._sharded import check_parts, is_sharded_checkpoint
from lightning_merge.files._write import is_remote, store_of

_PIECE = 2**20
_MOST_BESIDE = 3  # sound files that are named: each is read for it

_OF_TORCH = re.compile(r"unable to (?:open|mmap|stat|resize|map|read).*: [^:]+ \((\d+)\)")
"""Torch's words: "unable to open file </a/b> in read-only mode: Too many open files (24)"."""

_known_sound: dict[str, tuple[int, ...]] = {}  # of each file read in this process what the system said about it then


def check(path: str | os.PathLike[str]) -> None:
    """Raises if a checkpoint that training is to go on from is not as it was written.

    Reads all of it once. Checksums are those of the zip format that torch writes. Parts of a sharded checkpoint have
    none: of those the sizes are looked at.

    Args:
        path: A file, a folder of a sharded checkpoint, or a URL.

    Raises:
        RuntimeError: If it was cut off.
        ValueError: If it is damaged; sound files beside it are named.
        OSError: If the system refuses to open it.
    """
    if not is_remote(path) and is_sharded_checkpoint(Path(path)):
        check_parts(Path(path))
        return
    with opened(path) as file:
        if not is_zip(file):
            raise RuntimeError(
                f"{path} is not a complete checkpoint: {file.seek(0, 2)} bytes, without the index that ends one. It was"
                f" cut off while it was written or copied; {_instead(path)}."
            )
    check_sums(path)
    with opened(path) as file:
        try:
            torch._C.PyTorchFileReader(file)  # looks at more of an index than Python
        except RuntimeError as error:
            raise damaged(path, "torch cannot read its index") from error


def is_zip(file: Any) -> bool:
    """Whether a file ends as a zip file does, be its index damaged or not.

    Args:
        file: A path, or a file to read.
    """
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:  # one that says to go on in another file
        return True


def check_sums(path: str | os.PathLike[str], tensors: bool = True) -> None:
    """Raises if a zip file's content does not have the checksums in its index; other files have none.

    A file is read for it once in a process, unless it changes.

    Args:
        path: A file or a URL.
        tensors: All of it; else what says which tensors there are, which takes no time.

    Raises:
        ValueError: If it is damaged; sound files beside it are named.
    """
    if (problem := damage(path, tensors)) is not None:
        raise damaged(path, problem)


def damaged(path: str | os.PathLike[str], problem: str) -> ValueError:
    """The error for a file that is not as it was written; sound files beside it are named."""
    return ValueError(f"{path} is damaged: {problem}. It was changed on the disk or in a copy; {_instead(path)}.")


def damage(path: str | os.PathLike[str], tensors: bool = True) -> str | None:
    """What is wrong with a file, in words; ``None`` if nothing is, or nothing can tell."""
    with opened(path) as file:
        seen = None if is_remote(path) else _identity(file)
        if seen is not None and _known_sound.get(os.path.abspath(path)) == seen:
            return None
        problem = _damage_in(file, tensors)
        # A clock of the file system may not tell two writes within its tick apart.
        if problem is None and tensors and seen is not None and time.time_ns() - seen[2] > 2 * 10**9:
            _known_sound[os.path.abspath(path)] = seen
    return problem


def _damage_in(file: IO[bytes], tensors: bool) -> str | None:
    if not is_zip(file):
        return None
    try:
        with zipfile.ZipFile(file) as parts:
            entries = parts.infolist()
            if len({entry.filename for entry in entries}) != len(entries):
                return "parts of it stand there twice"
            if not any(entry.CRC for entry in entries):
                return None  # `torch.serialization.set_crc32_options(False)`
            for entry in entries:
                if not tensors and "/data/" in entry.filename:
                    continue
                if entry.compress_type != zipfile.ZIP_STORED:
                    return f"its part `{entry.filename}` was compressed, which torch does not read"
                try:
                    with parts.open(entry) as part:
                        while part.read(_PIECE):
                            pass
                except (zipfile.BadZipFile, EOFError) as error:
                    return f"its part `{entry.filename}` is not as it was written ({error})"
    except (zipfile.BadZipFile, NotImplementedError, ValueError, UnicodeDecodeError, zlib.error) as error:
        return f"its index is not as it was written ({error})"
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return "its index leads to where no file can be"
    return None


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return (status.st_ino, status.st_size, status.st_mtime_ns)


def _instead(path: str | os.PathLike[str]) -> str:
    others = sound_beside(path)
    return f"resume from another file: {', '.join(others)}" if others else "there is no other file beside it"


def sound_beside(path: str | os.PathLike[str]) -> list[str]:
    """The latest few sound checkpoints in the same folder, by name."""
    if is_remote(path):
        return []
    path = Path(path)
    try:
        others = [each for each in path.parent.glob("*.ckpt") if each != path and each.is_file()]
        latest = sorted(others, key=lambda each: each.stat().st_mtime_ns, reverse=True)
        sound: list[str] = []
        for each in latest:
            if is_zip(each) and damage(each) is None:
                sound.append(str(each))
            if len(sound) == _MOST_BESIDE:
                break
    except OSError:
        return []
    return sorted(sound)


# ---- what the system says


@contextmanager
def opened(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to read, on the disk or in a store.

    Raises:
        OSError: If the system refuses; its reason is said.
        ValueError: If it is a pipe or a device, which may never end.
    """
    with naming(path):
        if not is_remote(path) and not _may_be_file(path):
            raise ValueError(f"{path} is a pipe, a socket or a device, not a file.")
        if is_remote(path):
            store, name = store_of(os.fspath(path))
            source: Any = store.open(name, "rb")
        else:
            source = open(path, "rb")  # noqa: SIM115 (it is closed below)
        with source as file:
            yield file


def _may_be_file(path: str | os.PathLike[str]) -> bool:
    try:
        mode = os.stat(path).st_mode
    except OSError:  # who opens it says why
        return True
    return stat.S_ISREG(mode) or stat.S_ISDIR(mode)


@contextmanager
def naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """What the system refuses is not damage: the error says what the system said, and about which file.

    Raises:
        OSError: Instead of an error of the system, or of torch about one.
    """
    try:
        yield
    except OSError as error:
        if str(error).startswith(f"{os.fspath(path)} "):  # said already; a store may give the name alone
            raise
        raise _refused(path, error) from error
    except RuntimeError as error:
        if (found := _OF_TORCH.search(str(error))) is None:
            raise
        number = int(found[1])
        raise _refused(path, OSError(number, os.strerror(number))) from error


def is_of_the_system(error: Exception) -> bool:
    """Whether ``naming`` says what the system refused."""
    return isinstance(error, OSError) or (isinstance(error, RuntimeError) and bool(_OF_TORCH.search(str(error))))


def _refused(path: str | os.PathLike[str], error: OSError) -> OSError:
    cure = ""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        cure = " Raise the limit (`ulimit -n`), or close files."
    kind = type(error) if type(error).__init__ is OSError.__init__ else OSError
    reason = error.strerror or ("there is no such file" if isinstance(error, FileNotFoundError) else error)
    named = kind(f"{os.fspath(path)} cannot be read now: {reason}.{cure}")
    named.errno = error.errno
    return named
