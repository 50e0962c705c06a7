"""Every way in which a file of weights is read, under one signature: ``reader(path, folder to write to)``."""

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge import combiners
from lightning_merge._commands import _combine, _combine_arguments
from lightning_merge._commands._diff import diff
from lightning_merge._commands._doctor import doctor
from lightning_merge._commands._export import export
from lightning_merge._commands._inspect import describe
from lightning_merge.combiners import combine_files
from lightning_merge.compat import read_weights
from lightning_merge.files import check
from lightning_merge.trajectory import Checkpoint, Trajectory

Reader = Callable[[Path, Path], Any]


def written(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(path, weights_only=True)
    return content


def _export(path: Path, folder: Path) -> dict[str, Any]:
    export(str(path), folder / "exported.pt", None, "", None, force=True)
    return written(folder / "exported.pt")


def combined(command: str, sources: list[Path], target: str | Path, *more: str) -> dict[str, Any]:
    parser = argparse.ArgumentParser()
    (_combine_arguments.add_average if command == "average" else _combine_arguments.add_soup)(parser)
    arguments = [*map(str, sources), "--out", str(target), "--force", *more]
    _combine.combine(argparse.Namespace(command=command, **vars(parser.parse_args(arguments))))
    content: dict[str, Any] = written(Path(target))["state_dict"]
    return content


def _average(path: Path, folder: Path) -> dict[str, Any]:
    return combined("average", [path.parent], folder / "average.pt", "--pattern", path.name, "--weights", "published")


# What reads the numbers of a file, and gives those it publishes.
OF_WEIGHTS: dict[str, Reader] = {
    "read_weights": lambda path, folder: read_weights(path),
    "export": _export,
    "average": _average,
    "soup": lambda path, folder: combined("soup", [path, path], folder / "soup.pt"),
    "Checkpoint": lambda path, folder: Checkpoint(path).weights() | Checkpoint(path).extra,
    "Trajectory": lambda path, folder: Trajectory.of_files([path, path]).combine((0.5, 0.5)),
}
# What answers with a text or a merged model.
OTHERS: dict[str, Reader] = {
    "diff": lambda path, folder: diff(str(path), str(path)),
    "doctor": lambda path, folder: doctor([str(path), str(path)], None, None, "", 1),
    "combine_files": lambda path, folder: combine_files(combiners.Sum(1.0), path, [path]),
}
ALL: dict[str, Reader] = {**OF_WEIGHTS, **OTHERS, "inspect": lambda path, folder: describe(path)}
STRICT: dict[str, Reader] = {**OF_WEIGHTS, **OTHERS, "check": lambda path, folder: check(path)}


def equal(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether both hold the same, tensors bit for bit."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], value) if isinstance(value, Tensor) else found[name] == value
        for name, value in expected.items()
    )
