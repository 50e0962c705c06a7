"""A checkpoint file that is opened, and read tensor by tensor."""

import hashlib
import json
import math
import os
import weakref
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_merge.files._read import read
from lightning_merge.weights import Weights, canonical

WhichWeights: TypeAlias = Literal["raw", "published"]
"""Of a file with an average: the weights that training works on, or those that the file's score was measured on."""

_SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}


@dataclass(frozen=True)
class Place:
    """Where in the file a tensor is, and how to read it. Tied tensors have equal places."""

    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """How many numbers of the file it spans."""
        if 0 in self.shape:
            return 0
        return 1 + sum((size - 1) * step for size, step in zip(self.shape, self.stride, strict=True))

    @property
    def is_dense(self) -> bool:
        """Whether its numbers lie in their order, without gaps."""
        steps = [math.prod(self.shape[index + 1 :]) for index in range(len(self.shape))]
        return all(a == b or size == 1 for size, a, b in zip(self.shape, self.stride, steps, strict=True))


class Checkpoint:
    """A ``.ckpt``, ``.pt`` or ``.safetensors`` file whose tensors stay on disk until they are asked for.

    Nothing in the file is run: it is read with ``weights_only=True``.

    Args:
        path: A file of Lightning (ours or plain), a state dict that torch wrote, or a safetensors file.
        weights: Of a file of ours, ``"raw"`` weights or the ``"published"`` ones, which its ``state_dict`` holds.
            Other files have one set.

    Attributes:
        path: The file.
        step: ``global_step`` when it was written; ``None`` if the file does not say.
        epoch: Likewise.
        places: Where each tensor is, by the key it has in a ``state_dict``.

    Raises:
        ValueError: If there is no such file, it cannot be read, holds no weights, or would need unpickling.
    """

    def __init__(self, path: str | os.PathLike[str], weights: WhichWeights = "published") -> None:
        if weights not in get_args(WhichWeights):
            raise ValueError(f"`weights` must be 'raw' or 'published', got {weights!r}.")
        self.path = Path(path)
        self.step: int | None = None
        self.epoch: int | None = None
        self.places = self._safetensors() if self.path.suffix == ".safetensors" else self._torch(weights)
        self._file = self.path.open("rb", buffering=0)
        weakref.finalize(self, self._file.close)

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, step={self.step})"

    @property
    def like(self) -> Weights:
        """Tensors of the right names, shapes and dtypes that hold nothing."""
        return {name: torch.empty(at.shape, dtype=at.dtype, device="meta") for name, at in self.places.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own."""
        at = self.places[name]
        numbers = torch.empty(at.numbers, dtype=at.dtype)
        self.read_into(memory_of(numbers), name)
        return numbers.as_strided(at.shape, at.stride)

    def weights(self) -> Weights:
        """All tensors, in memory of their own; tied ones are one tensor."""
        read: dict[Place, Tensor] = {}
        for name, at in self.places.items():
            if at not in read:
                read[at] = self.tensor(name)
        return {name: read[at] for name, at in self.places.items()}

    def read_into(self, memory: memoryview, name: str, start: int = 0) -> None:
        """Fills the bytes with those of a tensor as they lie in the file, from number ``start`` on."""
        at = self.places[name]
        offset = at.offset + start * at.dtype.itemsize
        while memory:
            count = os.preadv(self._file.fileno(), [memory], offset)  # leaves other threads alone, as a seek would not
            if not count:
                raise ValueError(f"{self.path} ends before `{name}` does: it was cut short after it was opened.")
            memory, offset = memory[count:], offset + count

    def sha256(self) -> str:
        """The SHA-256 of the file, as ``sha256sum`` prints it."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    # ---- opening

    def _torch(self, weights: WhichWeights) -> dict[str, Place]:
        try:
            places = self._layout(read(self.path, "meta"), weights)  # where tensors are, without reading them
        except AttributeError:
            with FakeTensorMode():  # older torch tells it in this mode only, which takes six times as long
                places = self._layout(read(self.path), weights)
        if not places:
            raise ValueError(
                f"{self.path} holds no weights that could be found: no `state_dict`, and no tensors by name."
                " `lightning-merge inspect` says what is in it."
            )
        return places

    def _layout(self, content: Any, weights: WhichWeights) -> dict[str, Place]:
        if not zipfile.is_zipfile(self.path):
            raise ValueError(
                f"{self.path} was written by torch before 1.6, in a format that is read as a whole. Load it with"
                " `torch.load(..., weights_only=True)` and save it again."
            )
        if not isinstance(content, Mapping):
            return {}
        if isinstance(content.get("state_dict"), Mapping):
            self.step, self.epoch = _int(content.get("global_step")), _int(content.get("epoch"))
            places = _places(content["state_dict"])
            if weights == "raw" and "lightning_merge" in content:
                places = self._raw(places, content["lightning_merge"])
            return places
        return _places(content) if all(isinstance(each, Tensor) for each in content.values()) else {}

    def _raw(self, saved: dict[str, Place], label: Mapping[str, Any]) -> dict[str, Place]:
        if "raw" not in label:
            if label["holds"] == "raw":
                return saved
            raise ValueError(
                f"{self.path} holds the weights of the average {label['holds']!r} only, without the raw ones. Take"
                " files written without `save_weights_only=True`, or the published weights: `weights='published'`."
            )
        raw = _places(label["raw"])
        # Tied tensors are saved under each of their names, and set aside under one.
        by_place = {saved[key]: raw[name] for key in saved if (name := canonical(key)) in raw}
        return {key: by_place.get(at, at) for key, at in saved.items()}

    def _safetensors(self) -> dict[str, Place]:
        if not self.path.is_file():
            raise ValueError(f"there is no file {self.path}.")
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = os.fstat(file.fileno()).st_size
            try:
                header: Any = json.loads(file.read(length)) if length <= size - 8 else None
                places = {
                    name: _safetensors_place(entry, 8 + length, size)
                    for name, entry in header.items()
                    if name != "__metadata__"
                }
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise ValueError(
                    f"{self.path} cannot be read: it was cut short, or is no safetensors file ({error})."
                ) from error
        if not places:
            raise ValueError(f"{self.path} holds no tensors.")
        return places


def memory_of(numbers: Tensor) -> memoryview:
    """The bytes of a tensor of one dimension on the CPU, to be written to."""
    return memoryview(numbers.view(torch.uint8).numpy())  # type: ignore[arg-type]


def _places(tensors: Mapping[str, Any]) -> dict[str, Place]:
    return {name: _place(tensor) for name, tensor in tensors.items() if isinstance(tensor, Tensor)}


def _place(tensor: Any) -> Place:
    start = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.element_size()
    return Place(int(start), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _safetensors_place(entry: Mapping[str, Any], start: int, size: int) -> Place:
    shape, dtype = tuple(entry["shape"]), _SAFETENSORS_DTYPES[entry["dtype"]]
    first, last = entry["data_offsets"]
    if last - first != math.prod(shape) * dtype.itemsize or first < 0 or start + last > size:
        raise ValueError(f"bytes {first} to {last} do not hold a tensor of shape {shape}")
    stride = tuple(math.prod(shape[index + 1 :]) for index in range(len(shape)))
    return Place(start + first, shape, stride, dtype)


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, int) else None
