"""Files of tasks that were trained and could not be taken in: the vector, and what no vector holds."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import final

from torch import Tensor

from lightning_merge.continual._bank_files import safetensors_torch
from lightning_merge.files import atomic
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
    """

    number: int
    task: int | str
    vector: Weights
    parts: dict[str, Weights]

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
        with atomic(path) as file:
            file.write(safetensors_torch().save(flat, metadata))
        return path

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
        return cls(said["number"], said["task"], parts.pop(_VECTOR), parts)
