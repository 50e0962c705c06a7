"""A checkpoint file that is opened, and read tensor by tensor."""

import hashlib
import os
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lightning_merge._checks import one_of
from lightning_merge._checks import path as checked_path
from lightning_merge.files._check import damaged, is_zip, naming
from lightning_merge.files._folders import is_index, model_file, parts_of
from lightning_merge.files._label import KEY
from lightning_merge.files._layouts import no_weights, open_file, sets_of
from lightning_merge.files._other_formats import is_safetensors
from lightning_merge.files._places import Place, memory_of, place_of
from lightning_merge.files._read import read
from lightning_merge.files._refusals import refuse_no_plain
from lightning_merge.files._safetensors import contiguous_stride, read_header
from lightning_merge.files._sets import StoredSet, WeightFile, sources_of, stored
from lightning_merge.files._sharded import is_sharded_checkpoint, provenance_of, read_folder
from lightning_merge.files._sums import Sums
from lightning_merge.files._write import is_remote
from lightning_merge.weights import Weights

if TYPE_CHECKING:
    from lightning_merge.files._sharded_tensors import ShardedTensors

WhichWeights: TypeAlias = Literal["raw", "published"]
"""Of a file with an average: the weights that training works on, or those that the file's score was measured on."""


class Checkpoint:
    """A file that ``lightning-merge inspect`` knows, whose tensors stay on disk until they are asked for.

    Nothing in the file is run. What is read is held against the checksums in the file, once for each tensor.

    Args:
        path: A ``.ckpt``, ``.pt`` or ``.safetensors`` file of any layout that ``open_file`` knows, or the folder of a
            sharded checkpoint, of which the tensor that was read last is in host memory.
        weights: Of a file with an average, the ``"raw"`` weights or the ``"published"`` ones, which its score belongs
            to. Other files have one set.

    Attributes:
        path: The file.
        step: ``global_step`` when it was written; ``None`` if the file does not say.
        epoch: Likewise.
        places: Where each tensor is, by the name it has in a plain module.
        extra: What modules keep beside their tensors (``get_extra_state``).
        holds: Name of the set that is read, as ``lightning-merge inspect`` gives it.
        sets: Names of all sets in the file.
        merged_from: How many files it was merged from by ``lightning-merge average`` or ``soup``; 0 of any other.
        sharded: The tensors of a sharded checkpoint; ``None`` of any other file.

    Raises:
        ValueError: If there is no such file, it cannot be read, holds no weights, or would run code.
        OSError: If the system refuses to read it.
    """

    def __init__(self, path: str | os.PathLike[str], weights: WhichWeights = "published") -> None:
        one_of("weights", weights, WhichWeights)
        if is_remote(checked_path("path", path)):
            raise ValueError(f"{path} is not on this machine: only local files are read tensor by tensor. Copy it.")
        self.path = Path(path)
        if not self.path.exists():
            raise ValueError(f"`path`: there is no file {self.path}.")
        self.step: int | None = None
        self.epoch: int | None = None
        self.extra: dict[str, Any] = {}
        self.holds = "weights"
        self.sets: tuple[str, ...] = ("weights",)
        self.merged_from = 0
        self.places: dict[str, Place] = {}
        self._memory: Mapping[str, Tensor] = {}  # of a file that cannot be read in pieces of tensors
        self.sharded: ShardedTensors | None = None
        self._sums: Sums | None = None
        if self.path.is_dir() and not is_sharded_checkpoint(self.path):
            self.path, _ = model_file(self.path)
        if is_sharded_checkpoint(self.path):
            self._sharded(weights)
        elif is_index(self.path):
            self._whole(weights)
        elif is_safetensors(self.path):
            self._safetensors()
        else:
            self._torch(weights)
        self._file: IO[bytes] | None = None
        self._identity: tuple[int, ...] = ()
        if not self._memory:
            self._open()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, step={self.step})"

    @property
    def like(self) -> Weights:
        """Tensors of the right names, shapes and dtypes that hold nothing."""
        return {name: torch.empty(at.shape, dtype=at.dtype, device="meta") for name, at in self.places.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, in memory of its own.

        Args:
            name: Name of the tensor.
        """
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
        """Fills the bytes with those of a tensor as they lie in the file, from number ``start`` on.

        Args:
            memory: Where the bytes go; its length says how many.
            name: Name of the tensor.
            start: First byte, counted from the start of the tensor.

        Raises:
            ValueError: If they are not those that were written, or are no longer there.
        """
        at = self.places[name]
        if name in self._memory:
            held = memory_of(self._memory[name].view(-1))
            memory[:] = held[start * at.dtype.itemsize :][: len(memory)]
            return
        handle, file = self._handle()
        try:
            self._refuse_damage(handle, name, at)
            offset = at.offset + start * at.dtype.itemsize
            while memory:
                count = os.preadv(handle, [memory], offset)  # leaves other threads alone, as a seek would not
                if not count:
                    raise ValueError(f"{self.path} ends before `{name}` does: it was cut short after it was opened.")
                memory, offset = memory[count:], offset + count
        finally:
            if file is not None:
                file.close()

    def sha256(self) -> str:
        """The SHA-256 of the file, as ``sha256sum`` prints it; of several files that of their hashes, by name."""
        several = is_index(self.path) or self.path.is_dir()
        if several:
            files = parts_of(self.path) if is_index(self.path) else self.path.iterdir()
            files = sorted(each for each in files if each.is_file())
            return hashlib.sha256("".join(f"{each.name} {_sha256(each)}\n" for each in files).encode()).hexdigest()
        return _sha256(self.path)

    # ---- opening

    def _open(self) -> None:
        """Keeps the file open, unless so many are that the process would soon be refused one."""
        with naming(self.path):
            file = self.path.open("rb", buffering=0)
        self._identity = _identity(file)
        if file.fileno() >= _most_open():  # the lowest free number, so it counts what others have open too
            file.close()
            return
        self._file = file
        weakref.finalize(self, file.close)

    def _handle(self) -> tuple[int, IO[bytes] | None]:
        """The file to read from, and what to close afterwards."""
        if self._file is not None:
            return self._file.fileno(), None
        with naming(self.path):
            file = self.path.open("rb", buffering=0)
        if _identity(file)[:2] != self._identity[:2]:
            file.close()
            raise ValueError(f"{self.path} was replaced after it was opened. Open the run again.")
        return file.fileno(), file

    def _refuse_damage(self, handle: int, name: str, at: "Place") -> None:
        if self._sums is not None and (problem := self._sums.problem(handle, at.offset, at.bytes)) is not None:
            if os.fstat(handle).st_size < at.offset + at.bytes:
                raise ValueError(f"{self.path} ends before `{name}` does: it was cut short after it was opened.")
            raise damaged(self.path, f"its part with `{name}` {problem}")

    def _torch(self, weights: WhichWeights) -> None:
        try:
            content = read(self.path, "meta")
            in_parts = is_zip(self.path)  # torch before 1.6 wrote no zip files
        except ValueError:  # it is damaged, or has tensors that are not read in parts
            in_parts = False
        if not in_parts:
            self._whole(weights)
            return
        try:
            self._take(sets_of(content, self.path), weights)
        except NotImplementedError:  # torch before 2.14 reads a sparse tensor, of which there is no storage
            self._whole(weights)
            return
        except AttributeError:
            try:
                with FakeTensorMode():  # older torch tells it in this mode only, which takes six times as long
                    self._take(sets_of(read(self.path), self.path), weights)
            except AttributeError:  # it has tensors without numbers
                self._whole(weights)
                return
        self._sums = Sums(self.path)
        if self.extra:
            self.extra = dict(_choose(open_file(self.path), weights).extra)

    def _take(self, file: WeightFile, weights: WhichWeights) -> None:
        chosen = self._chosen(file, weights)
        self.places = {name: place_of(tensor) for name, tensor in chosen.weights.items()}
        self.extra = dict(chosen.extra)
        if not self.places:
            raise ValueError(no_weights(file.content, self.path))

    def _chosen(self, file: WeightFile, weights: WhichWeights) -> StoredSet:
        """The set to be read; what the file says of itself is noted."""
        chosen = _choose(file, weights)
        self.path = chosen.file or self.path
        self.holds = next(name for name, found in file.sets.items() if found is chosen)
        self.sets = tuple(file.sets)
        content = file.content if isinstance(file.content, dict) else {}
        self.step, self.epoch = _int(content.get("global_step")), _int(content.get("epoch"))
        self.merged_from = len(sources_of(content))
        return chosen

    def _whole(self, weights: WhichWeights) -> None:
        """Reads all of it into host memory."""
        file = open_file(self.path)
        chosen = self._chosen(file, weights)
        refuse_no_plain(self.path, chosen.weights)
        self.extra = dict(chosen.extra)
        self._memory = {name: tensor.contiguous() for name, tensor in chosen.weights.items()}
        for name, tensor in self._memory.items():
            self.places[name] = Place(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)

    def _sharded(self, weights: WhichWeights) -> None:
        outlines: dict[str, Tensor] = {}
        content = read_folder(self.path, read, outlines)
        file = sets_of(content, self.path)
        chosen = self._chosen(file, weights)
        self.merged_from = len(sources_of({"provenance": provenance_of(self.path)}))
        in_place = file.choose() if KEY in content else chosen
        keys = {id(tensor): key for key, tensor in outlines.items()}
        tensors = (*chosen.weights.values(), *in_place.weights.values())
        if not all(id(tensor) in keys for tensor in tensors):  # some are transposed in the folder
            self._whole(weights)
            return
        self.extra = dict(chosen.extra)
        from lightning_merge.files._sharded_tensors import ShardedTensors  # takes long to import, and few need it

        self.sharded = ShardedTensors(
            self.path,
            {name: keys[id(tensor)] for name, tensor in chosen.weights.items()},
            {keys[id(tensor)]: name for name, tensor in in_place.weights.items()},
        )
        self._memory = self.sharded
        numbers = {id(tensor): number for number, tensor in enumerate(outlines.values())}
        for name, tensor in chosen.weights.items():
            shape = tuple(tensor.shape)
            self.places[name] = Place(numbers[id(tensor)], shape, contiguous_stride(shape), tensor.dtype)

    def _safetensors(self) -> None:
        header = read_header(self.path)
        like = {name: torch.empty(at.shape, dtype=at.dtype, device="meta") for name, at in header.items()}
        names = stored(like, "the whole file")
        for name in names.weights:
            entry = header[names.keys.get(name, name)]
            self.places[name] = Place(entry.start, entry.shape, contiguous_stride(entry.shape), entry.dtype)
        if not self.places:
            raise ValueError(f"{self.path} holds no tensors.")
        if names.extra:
            self.extra = dict(open_file(self.path).choose().extra)


def _choose(file: WeightFile, weights: WhichWeights) -> StoredSet:
    if weights == "published":
        return file.choose()
    if file.raw is None:
        raise ValueError(
            f"{file.path} holds the weights of the average {file.default!r} only, without the raw ones. Take"
            " files written without `save_weights_only=True`, or the published weights: `weights='published'`."
        )
    return file.choose(file.raw)


def _sha256(path: Path) -> str:
    with naming(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _most_open() -> int:
    """How many files the process has open when no more stay so: half of what it may have."""
    if sys.platform == "win32":
        return 256
    import resource

    return max(1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 2**16) // 2)


def _identity(file: IO[bytes]) -> tuple[int, ...]:
    status = os.fstat(file.fileno())
    return (status.st_dev, status.st_ino)


def _int(value: Any) -> int | None:
    return int(value) if isinstance(value, int) else None
