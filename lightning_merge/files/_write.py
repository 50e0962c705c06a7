"""The one way in which a file gets its content: all of it, or nothing changes.

On a local disk the content is written under a temporary name beside the target, flushed to the disk, given its name by
a rename, and the folder is flushed. Whoever is killed at any moment leaves the old file or the new one under the name,
and at worst a file that ends in ``.tmp``, which nobody reads.

What that means elsewhere:

- **Windows**: the rename replaces too, but fails with "permission denied" while another process has the old file open;
  the old file stays then. A folder cannot be flushed there, so a power cut may bring the old file back.
- **NFS**: the rename is atomic on the server. Another machine may see the old file for as long as it caches names.
- **Object stores** (``s3://``, ``gs://``, ``memory://``, what fsspec opens): there is no rename. An object appears
  under its name once it was sent completely, which is as good, so the content is made on the local disk and then sent.
  Two writers of one name: the later one wins, and neither is told.
- **Locks** hold among processes that see one file system, and only there: not on object stores, and not across
  machines on network file systems that were mounted without them. Nothing here depends on a lock to keep a file whole.
  Locks only say that a process lives (``rules/_snapshots.py``): without them less is tidied up.
"""

import errno
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_OF_SAFETENSORS = re.compile(r"I/O error: .*\(os error (\d+)\)")
_REMOTE = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether it is a URL as ``s3://bucket/run``, which fsspec opens.

    Args:
        path: A path or a URL.

    Example:
        >>> is_remote("s3://bucket/run"), is_remote("runs/a"), is_remote("C:/runs")
        (True, False, False)
    """
    return _REMOTE.match(os.fspath(path)) is not None


def exists(path: str | os.PathLike[str]) -> bool:
    """Whether there is a file, on the disk or in a store.

    Args:
        path: A path, or a URL that fsspec opens.
    """
    if not is_remote(path):
        return Path(path).exists()
    store, name = store_of(os.fspath(path))
    return bool(store.exists(name))


def store_of(url: str) -> tuple[Any, str]:
    """The store that a URL leads to, and the name in it.

    Raises:
        ValueError: If there is no such kind of store.
        ImportError: If what reaches it is not installed.
    """
    import fsspec  # comes with torch

    try:
        store, name = fsspec.core.url_to_fs(url)
    except ValueError as error:
        raise ValueError(f"{url} leads to no store: {error}.") from error
    except ImportError as error:
        raise ImportError(f"{url} cannot be reached: {error}.") from error
    return store, name


def join(folder: str | os.PathLike[str], name: str) -> str:
    """A file in a folder, which may be a URL.

    Args:
        folder: A path or a URL.
        name: The name of the file.

    Example:
        >>> join("s3://bucket/run/", "ema-final.ckpt")
        's3://bucket/run/ema-final.ckpt'
    """
    return f"{os.fspath(folder).rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


@contextmanager
def atomic(target: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """A file to write to; when the block ends its content is on the disk under the target's name.

    After an exception the target is as it was.

    Args:
        target: A path, in a folder that exists, or a URL.

    Raises:
        OSError: If it cannot be written (a full disk, a folder of that name, ...); the target is named.
    """
    with replacing(target) as unfinished, unfinished.open("wb") as file:
        yield file


@contextmanager
def replacing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """As ``atomic``, for what writes to a path: where to write in the block, an empty file.

    Args:
        target: The file to be replaced; a path, or a URL that fsspec opens.

    Raises:
        OSError: As ``atomic``.
    """
    if is_remote(target):
        with tempfile.TemporaryDirectory() as folder:
            unfinished = Path(folder) / "content"
            unfinished.touch()
            yield unfinished
            with _naming(target):
                _send(unfinished, os.fspath(target))
        return
    path = Path(target)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder: name a file in it, as {path / 'NAME'}.")
    unfinished = path.with_name(f"{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        with _naming(target):
            unfinished.open("xb").close()  # Python says why it cannot be made; other writers do not
            yield unfinished
            with unfinished.open("rb+") as file:
                os.fsync(file.fileno())
            unfinished.replace(path)
            flush_folder(path.parent)
    finally:
        unfinished.unlink(missing_ok=True)


@contextmanager
def replacing_folder(target: Path) -> Iterator[Path]:
    """A folder to fill; when the block ends its files are on the disk, and it has the target's name.

    A folder cannot be replaced by one rename. Whoever is killed between the two leaves none under the name, and the old
    one beside it, under a name that ends in ``.old.tmp``. After an exception the target is as it was.

    Args:
        target: A path, in a folder that exists.

    Raises:
        OSError: If it cannot be written; the target is named.
    """
    unfinished = target.with_name(f"{target.name[:200]}.{secrets.token_hex(4)}.tmp")
    old = unfinished.with_suffix(".old.tmp")
    try:
        with _naming(target):
            unfinished.mkdir()
            yield unfinished
            for file in unfinished.iterdir():
                with file.open("rb+") as content:
                    os.fsync(content.fileno())
            flush_folder(unfinished)
            if target.exists():
                target.replace(old)
            try:
                unfinished.replace(target)
            except OSError:
                if old.exists():
                    old.replace(target)
                raise
            flush_folder(target.parent)
    finally:
        for each in (unfinished, old):
            if each.is_symlink():
                each.unlink()  # the target was a link to a folder, which stays
            else:
                shutil.rmtree(each, ignore_errors=True)


def flush_folder(folder: Path) -> None:
    """Brings the names in a folder to the disk, where a system can do that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # some network file systems
            raise
    finally:
        os.close(handle)


@contextmanager
def _naming(target: str | os.PathLike[str]) -> Iterator[None]:
    """An error of the system says which file it is about, whatever was between."""
    try:
        yield
    except Exception as error:
        cause = _of_the_system(error)
        if cause is None:
            raise
        named = type(cause)(f"{os.fspath(target)} was not written: {cause.strerror or cause}. What was there is left.")
        named.errno = cause.errno
        raise named from error


def _of_the_system(error: BaseException) -> OSError | None:
    """The error of the system behind one: torch's writer hides it behind one of its own."""
    if (found := _OF_SAFETENSORS.search(str(error))) is not None:
        number = int(found[1])
        return OSError(number, os.strerror(number))
    link: BaseException | None = error
    while link is not None:
        if isinstance(link, OSError):
            return link
        link = link.__cause__ or link.__context__
    return None


def _send(source: Path, url: str) -> None:
    store, name = store_of(url)
    store.makedirs(name.rpartition("/")[0], exist_ok=True)
    with source.open("rb") as content, store.transaction, store.open(name, "wb") as sent:
        shutil.copyfileobj(content, sent, 2**22)
