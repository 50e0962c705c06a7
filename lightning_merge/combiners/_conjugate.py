"""Conjugate gradients whose way can be kept in a folder."""

import hashlib
import os
import time
from pathlib import Path

import torch
from torch import Tensor

from lightning_merge.files._write_safetensors import write_safetensors

_SECONDS = 10.0
"""Between two times that the way is written down."""


def descended(
    found: Tensor,
    gram: Tensor,
    target: Tensor,
    tolerance: float,
    iterations: int,
    folder: str | os.PathLike[str] | None = None,
) -> Tensor:
    """Conjugate gradients from ``found`` for ``found @ gram = target``, inner products over the whole weight.

    Args:
        found: Where they start, (out, d).
        gram: Symmetric, (d, d).
        target: The right side, (out, d).
        tolerance: Share of the right side's 2-norm at which the residual is small enough.
        iterations: At most so many.
        folder: Where the way is kept, and gone on from if it is that of the same start, sides and tolerance.
    """
    path = None if folder is None else Path(folder) / _name(found, gram, target, tolerance)
    enough = (tolerance * target.norm()).square()
    rest = target - found @ gram
    way = {"found": found, "rest": rest, "direction": rest, "size": rest.square().sum(), "done": torch.tensor(0)}
    if path is not None and path.exists() and int((kept := _read(path, found.device))["done"]) <= iterations:
        way = kept
    written, begun = int(way["done"]), time.monotonic()
    while int(way["done"]) < iterations and bool(way["size"] > enough):
        way = _next(way, gram)
        if path is not None and time.monotonic() - begun >= _SECONDS:
            _write(path, way)
            written, begun = int(way["done"]), time.monotonic()
    if path is not None and (written != int(way["done"]) or not path.exists()):
        _write(path, way)
    return way["found"]


def _next(way: dict[str, Tensor], gram: Tensor) -> dict[str, Tensor]:
    """A step further."""
    image = way["direction"] @ gram
    step = way["size"] / (way["direction"] * image).sum()
    found, rest = way["found"] + step * way["direction"], way["rest"] - step * image
    size = rest.square().sum()
    direction = rest + (size / way["size"]) * way["direction"]
    return {"found": found, "rest": rest, "direction": direction, "size": size, "done": way["done"] + 1}


def _name(*what: Tensor | float) -> str:
    """A file's name that follows from the problem, so that another one is never gone on with."""
    digest = hashlib.sha256()
    for each in what:
        if isinstance(each, Tensor):
            digest.update(f"{each.dtype} {tuple(each.shape)}".encode())
            digest.update(each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        else:
            digest.update(repr(each).encode())
    return f"mats-{digest.hexdigest()[:16]}.safetensors"


def _write(path: Path, way: dict[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(
        path, {key: tensor.cpu().clone(memory_format=torch.contiguous_format) for key, tensor in way.items()}, {}
    )


def _read(path: Path, device: torch.device) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    way: dict[str, Tensor] = load_file(path)
    return {key: tensor.to(device) for key, tensor in way.items()}
