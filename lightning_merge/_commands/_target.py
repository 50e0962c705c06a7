"""Where a command writes to."""

import json
import os
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning_merge.files import exists, is_remote, replacing
from lightning_merge.files._sharded import is_sharded_checkpoint


def loading(path: str | os.PathLike[str], plainly: str, end: str = ")") -> str:
    """The line that loads what was written there.

    Args:
        path: A path or a URL.
        plainly: What reads it without lightning-merge, with ``{path}``.
        end: What closes the line.
    """
    if is_remote(path):
        read_it = f"model.load_state_dict(read_weights({literal(path)}){end}"
        return f"from lightning_merge.compat import read_weights; {read_it}"
    return f"model.load_state_dict({plainly.format(path=literal(path))}{end}"


def literal(path: str | os.PathLike[str]) -> str:
    """A path as Python reads it, whatever is in its name.

    Example:
        >>> print(literal('runs/my "best"/last.ckpt'))
        "runs/my \\"best\\"/last.ckpt"
    """
    return json.dumps(os.fspath(path), ensure_ascii=False)


def refuse_target(target: str | os.PathLike[str], what: str, suffixes: tuple[str, ...], force: bool) -> None:
    """Raises before anything is read.

    Args:
        target: A path or a URL.
        what: What errors call it.
        suffixes: Its name must end in one of them.
        force: Whether an existing file is replaced.

    Raises:
        ValueError: If it is a folder, exists without ``force``, is in no folder, or has another ending.
    """
    local = None if is_remote(target) else Path(target)
    if local is not None and local.is_dir():
        raise ValueError(
            f"{what} must be a file, and {target} is a folder: name a file in it, as {local / 'merged'}.pt."
        )
    if not os.fspath(target).endswith(suffixes):
        raise ValueError(f"{what} must end in {', '.join(suffixes)}, got {target}.")
    if not force and exists(target):
        raise ValueError(f"{target} exists already; --force replaces it.")
    if local is not None and not local.parent.is_dir():
        raise ValueError(f"there is no folder {local.parent} to write {local.name} to.")


def folder_of(target: str) -> Path | None:
    """The folder that a name means, which has no ending or ends in a slash; ``None`` of a file."""
    if is_remote(target) or not (target.endswith(("/", os.sep)) or not Path(target).suffix):
        return None
    return Path(target)


def refuse_folder(folder: Path, force: bool) -> None:
    """Raises before anything is read, if a sharded checkpoint cannot be written there.

    Args:
        folder: Its path.
        force: Whether an existing sharded checkpoint is replaced.

    Raises:
        ValueError: If something else is there, or a sharded checkpoint without ``force``, or it is in no folder.
    """
    if folder.is_dir() and not is_sharded_checkpoint(folder):
        raise ValueError(
            f"`--out` must be a file, and {folder} is a folder with other things in it, which are not replaced: name a"
            f" file in it, as {folder / 'merged'}.pt, or a folder for a sharded checkpoint, as {folder / 'merged'}."
        )
    if folder.is_file():
        raise ValueError(f"{folder} is a file, which a sharded checkpoint does not replace: name another folder.")
    if folder.exists() and not force:
        raise ValueError(f"{folder} exists already; --force replaces it.")
    if not folder.parent.is_dir():
        raise ValueError(f"there is no folder {folder.parent} to write {folder.name} to.")


def refuse_input(target: str | os.PathLike[str], inputs: Iterable[str | os.PathLike[str] | None]) -> None:
    """Raises if a command would write over one of the files that it reads, under whatever name.

    Raises:
        ValueError: Naming the input.
    """
    if is_remote(target):
        return
    given = list(inputs)
    local = [Path(each) for each in given if each is not None and not is_remote(each)]
    for folder in filter(is_sharded_checkpoint, local):
        if folder.resolve() in Path(target).resolve().parents:
            raise ValueError(f"{target} is inside of {folder}, one of the inputs: name a place outside of it.")
    if not Path(target).exists():
        return
    for each in given:
        if each is None or is_remote(each) or not Path(each).exists():
            continue
        if any(place.samefile(target) for place in (Path(each), *Path(each).resolve().parents)):
            name = "" if os.fspath(each) == os.fspath(target) else f" ({each})"
            what = "is" if Path(each).samefile(target) else "holds"
            raise ValueError(
                f"{target} {what} one of the inputs{name}, which would be lost: name another file, also with `--force`."
            )


def save(content: Any, target: str | os.PathLike[str]) -> None:
    """Writes what ``torch.load(..., weights_only=True)`` reads; an existing file stays until all of it is there.

    Raises:
        ValueError: If that could not read it.
        OSError: If it cannot be written.
    """
    import torch

    with replacing(target) as unfinished:
        with unfinished.open("wb") as file:  # torch's own writer does not say what the system refuses
            torch.save(content, file)
        try:
            torch.load(unfinished, map_location="cpu", weights_only=True, mmap=True)  # reads no numbers
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{target} was not written: the set holds objects beside its tensors that `weights_only=True` does not"
                f" read back ({str(error).partition('GLOBAL ')[2].split(' ')[0]})."
            ) from error
