"""A file and one of its sets, whose tensors stay on disk if it is a sharded checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge.files._layouts import named_set, open_set, sets_of
from lightning_merge.files._read import read
from lightning_merge.files._refusals import refuse_no_plain
from lightning_merge.files._sets import WeightFile
from lightning_merge.files._sharded import is_sharded_checkpoint, read_folder
from lightning_merge.weights import Weights


@dataclass(frozen=True)
class Opened:
    """A set of a file.

    Args:
        file: With the numbers of its tensors, or with names and shapes alone.
        chosen: The set.
        outlines: Of a folder its tensors by key, without numbers; ``None`` of a file.
    """

    file: WeightFile
    chosen: str
    outlines: dict[str, Tensor] | None

    def of(self, name: str) -> "Opened":
        """Another set of the same file."""
        return Opened(self.file, name, self.outlines)

    @property
    def like(self) -> Weights:
        """Tensors of the right names and shapes."""
        return self.file.choose(self.chosen).weights

    def tensors(self) -> Mapping[str, Tensor]:
        """The numbers; those of a folder are read when they are looked up, one tensor at a time.

        Raises:
            ValueError: If one is quantised, nested or sparse.
        """
        found = self.like
        if self.outlines is not None:
            from lightning_merge.files._sharded_tensors import ShardedTensors  # takes long to import

            keys = {id(tensor): key for key, tensor in self.outlines.items()}
            if all(id(tensor) in keys for tensor in found.values()):
                names = {name: keys[id(tensor)] for name, tensor in found.items()}
                return ShardedTensors(Path(self.file.path), names, {})
            found = (
                sets_of(read(self.file.path), self.file.path).choose(self.chosen).weights
            )  # some lie otherwise there
        refuse_no_plain(self.file.path, found)
        return found


def open_lazily(text: str) -> Opened:
    """A file and one of its sets from ``FILE`` or ``FILE:SET``.

    Raises:
        ValueError: As ``open_set``.
    """
    name, chosen = named_set(text)
    if not is_sharded_checkpoint(Path(name)):
        return Opened(*open_set(text), None)
    outlines: dict[str, Tensor] = {}
    content: Any = read_folder(Path(name), read, outlines)
    file = sets_of(content, Path(name))
    return Opened(file, file.default if chosen is None else chosen, outlines)
