"""A file of statistics: safetensors, in which names begin with what a tensor is.

``fisher/NAME``, ``gram/NAME`` or ``adam/NAME`` are statistics of the parameter NAME, ``weights/NAME`` a few of its
numbers. What else there is to say is JSON under one key of the header.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from lightning_merge.files._safetensors import Entry, read_entry, read_header_and_words
from lightning_merge.files._write_safetensors import write_safetensors

_KEY = "lightning_merge_statistics"
_WEIGHTS = "weights"
_FORMAT = 1


@final
@dataclass(frozen=True)
class OnDisk(Mapping[str, Tensor]):
    """Tensors of a file, each read when it is asked for."""

    path: str
    entries: dict[str, Entry]
    norm: float

    def __getitem__(self, name: str) -> Tensor:
        """Reads it."""
        return read_entry(self.path, self.entries[name])

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self.entries)

    def __len__(self) -> int:
        """How many there are."""
        return len(self.entries)

    def __contains__(self, name: object) -> bool:
        """Whether there is one of this name; nothing is read."""
        return name in self.entries


def write(
    path: str, kind: str, tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Writes a file whole or not at all."""
    whole = {f"{kind}/{name}": t.detach().cpu().contiguous() for name, t in tensors.items()}
    whole |= {f"{_WEIGHTS}/{name}": t.contiguous() for name, t in weights.items()}
    write_safetensors(path, whole, {_KEY: json.dumps({"format": _FORMAT, "kind": kind, **facts})})


def read(path: str) -> dict[str, Any]:
    """The fields of the statistics in a file, whose tensors stay on the disk.

    Raises:
        ValueError: If it is no such file.
    """
    entries, words = read_header_and_words(path)
    if _KEY not in words:
        raise ValueError(
            f"{os.fspath(path)} holds no statistics: `ImportanceStatistics` writes such files at the end of a fit."
        )
    facts = json.loads(words[_KEY])
    if facts["format"] > _FORMAT:
        raise ValueError(f"{os.fspath(path)} was written by a newer lightning-merge: update it.")
    kind, norm = facts["kind"], float(facts["norm"])
    own = {name.partition("/")[2]: at for name, at in entries.items() if name.startswith(f"{kind}/")}
    few = {name.partition("/")[2]: at for name, at in entries.items() if name.startswith(f"{_WEIGHTS}/")}
    return {
        "kind": kind,
        "tensors": OnDisk(path, own, norm),
        "samples": facts["samples"],
        "labels": facts["labels"],
        "left_out": facts["left_out"],
        "weights": {name: read_entry(path, at) for name, at in few.items()},
        "aliases": facts["aliases"],
        "names": frozenset(facts["names"]),
    }
