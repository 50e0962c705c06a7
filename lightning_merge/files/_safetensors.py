"""The safetensors format, as strictly as the library of that name reads it.

A file is the length of its header in 8 bytes, the header (JSON: of each tensor its dtype, shape and bytes), and the
bytes, without holes or overlaps.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from lightning_merge.files._check import opened
from lightning_merge.files._other_formats import other_format
from lightning_merge.files._places import memory_of
from lightning_merge.files._read import refuse_no_file
from lightning_merge.files._write import is_remote
from lightning_merge.weights import Weights

_LONGEST_HEADER = 100_000_000  # the library's
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Entry:
    """One tensor: where its bytes are in the file, and what they are."""

    start: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """Where each tensor is.

    Raises:
        ValueError: If there is no such file, or it is none that the library would read.
        OSError: If the system refuses to read it.
    """
    return read_header_and_words(path)[0]


def read_header_and_words(path: str | os.PathLike[str]) -> tuple[dict[str, Entry], dict[str, str]]:
    """Where each tensor is, and what the writer said of them (``__metadata__``).

    Raises:
        ValueError: As ``read_header``.
    """
    if not is_remote(path):
        refuse_no_file(Path(path))
    with opened(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, _LONGEST_HEADER):
            raise ValueError(_unreadable(path, size, f"its header should have {length} bytes, and the file has {size}"))
        text = file.read(length)
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_repeats, parse_constant=_no_number)
        return _entries(header, 8 + length, size), dict(header.get("__metadata__", {}))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(_unreadable(path, size, str(error))) from error


def read_entry(path: str | os.PathLike[str], entry: Entry) -> Tensor:
    """One tensor of a file whose header was read, in memory of its own.

    Raises:
        ValueError: If the file was cut short since.
        OSError: If the system refuses to read it.
    """
    tensor = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
    with opened(path) as file:
        file.seek(entry.start)
        if file.readinto(memory_of(tensor)) != entry.bytes:  # type: ignore[attr-defined]  # as all binary files have
            raise ValueError(f"{os.fspath(path)} was cut short after it was opened.")
    return tensor.view(entry.shape)


def read_safetensors(path: str | os.PathLike[str]) -> Weights:
    """All tensors; they stay on the disk until they are used.

    Raises:
        ValueError: As ``read_header``.
    """
    entries = read_header(path)
    if is_remote(path):
        with opened(path) as file:
            content: Any = torch.frombuffer(bytearray(file.read()), dtype=torch.uint8).untyped_storage()
    else:
        with opened(path):  # what the system refuses is named there
            content = torch.UntypedStorage.from_file(os.fspath(path), False, os.path.getsize(path))
    weights: Weights = {}
    for name, entry in entries.items():
        held = content[entry.start : entry.start + entry.bytes]
        if entry.start % entry.dtype.itemsize:
            held = held.clone()  # memory of its own is aligned
        weights[name] = torch.empty(0, dtype=entry.dtype).set_(held, 0, entry.shape, contiguous_stride(entry.shape))
    return weights


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Steps between numbers that lie in their order, without gaps."""
    return tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))


def _entries(header: Mapping[str, Any], start: int, size: int) -> dict[str, Entry]:
    about = header.get("__metadata__", {})
    if not isinstance(about, dict) or not all(isinstance(value, str) for value in about.values()):
        raise ValueError("`__metadata__` must be texts by name")
    described = {name: entry for name, entry in header.items() if name != "__metadata__"}
    ends: dict[str, tuple[int, int]] = {}
    entries: dict[str, Entry] = {}
    for name, entry in described.items():
        if entry["dtype"] not in _DTYPES:
            raise ValueError(f"`{name}` is of dtype {entry['dtype']}, which torch does not have")
        name.encode()  # fails where the library does: half of a pair of characters
        shape = _whole_numbers(entry["shape"], f"shape of `{name}`")
        if math.prod(size or 1 for size in shape) >= 2**63:
            raise ValueError(f"`{name}` of shape {shape} has more numbers than can be counted")
        first, last = _whole_numbers(entry["data_offsets"], f"bytes of `{name}`", 2)
        ends[name] = (first, last)
        entries[name] = Entry(start + first, shape, _DTYPES[entry["dtype"]])
        if last - first != entries[name].bytes:
            raise ValueError(f"bytes {first} to {last} do not hold `{name}` of shape {shape}")
    reached = 0
    for name, (first, last) in sorted(ends.items(), key=lambda each: each[1]):
        if first != reached:
            raise ValueError(f"the bytes of `{name}` begin at {first}, where those before it end at {reached}")
        reached = last
    if start + reached != size:
        raise ValueError(f"its tensors take {reached} bytes, and it has {size - start}")
    return entries


def _whole_numbers(values: Any, what: str, count: int | None = None) -> tuple[int, ...]:
    whole = isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)
    if not whole or (count is not None and len(values) != count):
        raise ValueError(f"{what} must be whole numbers of at least 0, got {values}")
    return tuple(values)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"`{next(name for name in names if names.count(name) > 1)}` stands there twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number that a header may hold")


def _unreadable(path: str | os.PathLike[str], size: int, why: str) -> str:
    if size >= 8 and (kind := other_format(path)) is not None:
        return f"{os.fspath(path)} cannot be read: it is no safetensors file, but {kind}."
    return f"{os.fspath(path)} cannot be read: it was cut short, or is no safetensors file ({why})."
