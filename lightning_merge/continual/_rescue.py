"""Files of tasks that were trained and could not be taken in: the vector, and what no vector holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from lightning_merge.continual._bank_files import safetensors_torch
from lightning_merge.continual._bank_state import hashes_of
from lightning_merge.continual._stream_state import StreamState
from lightning_merge.files import atomic
from lightning_merge.importance import Statistics
from lightning_merge.weights import Weights

_KEY = "lightning_merge_rescue"
_SEPARATOR = "|"
_VECTOR = "vector"


@final
@dataclass(frozen=True)
class Rescue:
    """A task that is not in its bank.

    Attributes:
        number: Tasks that the bank had taken in before.
        task: Its label.
        vector: Its vector.
        parts: What the stream keeps after it besides, see ``StreamState``.
        statistics: What its combiner weighs it by, if it does; in a file of their own.
    """

    number: int
    task: int | str
    vector: Weights
    parts: dict[str, Weights]
    statistics: Statistics | None = None

    def write(self, folder: Path) -> Path:
        """The file that it is in from then on, in a folder."""
        parts: dict[str, Mapping[str, Tensor]] = {_VECTOR: self.vector, **self.parts}
        flat = {
            f"{part}{_SEPARATOR}{name}": tensor.detach().to("cpu", copy=True).contiguous()
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
        }
        metadata = {_KEY: json.dumps({"number": self.number, "task": self.task})}
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rescue-{self.number:04d}.safetensors"
        if self.statistics is not None:
            self.statistics.write(_beside(path))
        with atomic(path) as file:
            file.write(safetensors_torch().save(flat, metadata))
        return path

    def into(self, folder: Path, added: int, base_hashes: Mapping[str, str] | None) -> None:
        """Puts what no vector holds into the stream of a folder, whose bank has taken in so many tasks.

        Raises:
            ValueError: If the task does not come next there, or the stream has another base.
        """
        if self.number > added:
            raise ValueError(
                f"`rescue` must be of task {added} of the bank {folder}, the next one, got that of task {self.number}."
            )
        stream = StreamState(folder)
        if stream.has_base:
            base = stream.base()
            hashes_of({name: base[name] for name in self.vector}, base_hashes, folder)
        before = stream.load(added) if added else {}
        earlier = {part: tensors for part, tensors in before.items() if part.startswith(("head", "classes"))}
        parts = {part: {**earlier.pop(part, {}), **tensors} for part, tensors in self.parts.items()}
        stream.save(added + 1, {**earlier, **parts})

    @classmethod
    def read(cls, path: Path) -> "Rescue":
        """The task of a file.

        Raises:
            ValueError: If it is no such file.
        """
        content = path.read_bytes()
        try:
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            said = json.loads(header["__metadata__"][_KEY])
            flat = safetensors_torch().load(content)
        except Exception as error:  # whatever the library raises on content of another kind
            raise ValueError(f"`rescue` must be a file that a failed task has left, got {path}.") from error
        parts: dict[str, Weights] = {}
        for key, tensor in flat.items():
            part, _, name = key.partition(_SEPARATOR)
            parts.setdefault(part, {})[name] = tensor
        statistics = Statistics.open(_beside(path)) if _beside(path).exists() else None
        return cls(said["number"], said["task"], parts.pop(_VECTOR), parts, statistics)


def _beside(path: Path) -> Path:
    """Where the statistics of a rescued task are."""
    return path.with_name(f"{path.stem}-statistics.safetensors")
