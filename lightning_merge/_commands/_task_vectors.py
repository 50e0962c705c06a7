"""The base of several checkpoints, and what each added to it, in memory."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from lightning_merge.trajectory import Trajectory
    from lightning_merge.weights import Weights


class TaskVectors:
    """A base and task vectors, under the names of a module.

    Args:
        base: The checkpoint that all were fine-tuned from.
        trajectory: Those checkpoints.
        module: Whose names its ``state_dict`` gives.

    Raises:
        ValueError: If they are of several models, or a tensor cannot be merged; the file is named.
    """

    def __init__(self, base: "Path", trajectory: "Trajectory", module: "nn.Module") -> None:
        from lightning_merge._mergeable import carried
        from lightning_merge.combiners import task_vector
        from lightning_merge.trajectory import Checkpoint, Trajectory
        from lightning_merge.weights import canonical, is_averaged

        self.start: Checkpoint = Checkpoint(base)
        Trajectory([self.start, *trajectory])  # refuses another model
        keys = {canonical(key): key for key in module.state_dict()}
        self._names = {name: keys.get(canonical(name), name) for name in self.start.places}
        self.base: Weights = {}
        for name in self.start.places:
            tensor = self.start.tensor(name)
            if not is_averaged(tensor):
                tensor = carried(name, (checkpoint.tensor(name) for checkpoint in trajectory), trajectory.differing)
            self.base[self._names[name]] = tensor
        self._extra = trajectory[-1].extra
        added = [name for name in self.start.places if is_averaged(self.base[self._names[name]])]
        self.vectors: list[Weights] = []
        for checkpoint in trajectory:
            own = {self._names[name]: checkpoint.tensor(name) for name in added}
            try:
                self.vectors.append(task_vector(own, {name: self.base[name] for name in own}))
            except ValueError as error:
                raise ValueError(f"{checkpoint.path}: {error}") from error

    def as_in_files(self, merged: "Weights") -> "Weights":
        """Merged weights under the names of the files, with what modules keep beside their tensors."""
        return {**{name: merged[key] for name, key in self._names.items()}, **self._extra}
