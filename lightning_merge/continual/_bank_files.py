"""Files of tensors in a folder, each under a name that holds its hash."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from lightning_merge.weights import Weights


def safetensors_torch() -> Any:
    """The module, or an ``ImportError`` with the line that installs it."""
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError('a bank needs safetensors: pip install "lightning-merge[continual]"') from error
    return safetensors.torch


def write(folder: Path, stem: str, tensors: Weights) -> tuple[str, str]:
    """Name and hash of a new file that holds the tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{stem}.part"
    safetensors_torch().save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part)
    digest = file_digest(part)
    name = f"{stem}-{digest[:16]}.safetensors"
    put(folder, part, folder / name)
    return name, digest


def put(folder: Path, part: Path, path: Path) -> None:
    """Flushes a file to disk, then gives it its name, so that there is a whole file or none."""
    for flushed in (part, folder):
        handle = os.open(flushed, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
        if flushed is part:
            part.replace(path)


def damage_of(folder: Path, name: str, digest: str) -> str | None:
    """What is wrong with a file that had this hash; ``None`` if nothing is."""
    path = folder / name
    return None if path.is_file() and file_digest(path) == digest else damage(path)


def damage(path: Path) -> str:
    """What is wrong with a file that is not as it was written."""
    return f"{path} is damaged: it is not as it was written." if path.exists() else f"{path} is missing."


def file_digest(path: Path) -> str:
    """The SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(weights: Weights) -> str:
    """A hash of names, shapes, dtypes and every bit."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(repr((name, str(tensor.dtype), tuple(tensor.shape))).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
