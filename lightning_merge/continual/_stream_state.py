"""What a stream of tasks needs besides its vectors: the base, and the parts of the model that no vector holds."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import final

from torch import Tensor

from lightning_merge._checks import path as checked_path
from lightning_merge.continual._bank_files import safetensors_torch
from lightning_merge.files import atomic
from lightning_merge.weights import Weights

_SEPARATOR = "|"


@final
class StreamState:
    """Tensors of a stream on disk: ``base-<hash>.safetensors``, and after ``n`` tasks ``after-<n>-<hash>.safetensors``.

    A file is written under another name, flushed, and renamed, so there is a whole one or none. Its name holds the hash
    of its content, which is checked when it is read. What the stream is at is for the bank to say: the file of a task
    is written before the bank takes the task in, and the one before it is kept until then.

    Args:
        folder: The stream's folder.

    Example:
        >>> import tempfile, torch
        >>> state = StreamState(Path(tempfile.mkdtemp()))
        >>> state.save(1, {"head": {"weight": torch.ones(2)}})
        >>> state.load(1)["head"]["weight"]
        tensor([1., 1.])
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(checked_path("folder", folder))

    @property
    def has_base(self) -> bool:
        """Whether a base was saved."""
        return self._find("base") is not None

    def save_base(self, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the weights that all vectors are measured against.

        Args:
            tensors: The weights, by canonical name.
        """
        self._write("base", {"base": tensors})

    def base(self) -> Weights:
        """The weights that all vectors are measured against."""
        return self._read("base")["base"]

    def save(self, after: int, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Keeps groups of named tensors as they are after so many tasks.

        Args:
            after: Number of tasks that were taken in by then.
            parts: Named tensors by the name of their group.
        """
        self._write(f"after-{after}", parts)

    def load(self, after: int) -> dict[str, Weights]:
        """The groups kept after so many tasks; empty ones are not among them.

        Args:
            after: Number of tasks that were taken in by then.

        Raises:
            ValueError: If the file is missing, or is not as it was written.
        """
        return self._read(f"after-{after}")

    def forget_before(self, after: int) -> None:
        """Drops what earlier tasks left.

        Args:
            after: Number of tasks that were taken in by then.
        """
        for path in self.folder.glob("after-*.safetensors"):
            if int(path.stem.split("-")[1]) < after:
                path.unlink()

    def _find(self, stem: str) -> Path | None:
        return next(iter(sorted(self.folder.glob(f"{stem}-*.safetensors"))), None)

    def _write(self, stem: str, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
        flat = {
            f"{part}{_SEPARATOR}{name}": tensor.detach().to("cpu", copy=True).contiguous()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        content = safetensors_torch().save(flat)
        self.folder.mkdir(parents=True, exist_ok=True)
        for old in self.folder.glob(f"{stem}-*.safetensors"):
            old.unlink()  # of a process that was killed before the bank took its task in
        path = self.folder / f"{stem}-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        with atomic(path) as file:
            file.write(content)

    def _read(self, stem: str) -> dict[str, Weights]:
        path = self._find(stem)
        if path is None:
            raise ValueError(f"{self.folder} has no file {stem}-*.safetensors: it was removed, or never written.")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest()[:16] != path.stem.rpartition("-")[2]:
            raise ValueError(
                f"{path} is damaged: its content does not have the hash in its name. Restore it from a copy; the other"
                " files of the folder are not affected."
            )
        parts: dict[str, Weights] = {}
        for key, tensor in safetensors_torch().load(content).items():
            part, _, name = key.partition(_SEPARATOR)
            parts.setdefault(part, {})[name] = tensor
        return parts
