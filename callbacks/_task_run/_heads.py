"""The head of a stream's model: frozen, one for each task, or one that grows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge.callbacks._task_run._stored_samples import calibrated_head
from lightning_merge.continual import head_parameters, join_head
from lightning_merge.weights import Weights

Heads = Literal["freeze", "per_task", "grow"]


@final
@dataclass(frozen=True)
class Head:
    """Names the head's parameters and says what a task makes of them.

    Attributes:
        names: Canonical names of its parameters.
        mode: ``"freeze"``, ``"per_task"`` or ``"grow"``, as of ``ContinualMerging``.
    """

    names: list[str]
    mode: Heads

    def layer(self, module: nn.Module) -> nn.Linear:
        """The layer whose parameters the head is.

        Raises:
            ValueError: If it is not one linear layer.
        """
        for place, layer in weights.submodules(module):
            own = [
                weights.canonical(f"{place}.{name}".lstrip(".")) for name, _ in layer.named_parameters(recurse=False)
            ]
            if isinstance(layer, nn.Linear) and own == self.names:
                return layer
        raise ValueError(
            f"`store_samples_per_class` must be 0 here: the head must be one linear layer, and it is {self.names}."
        )

    def start(self, base: Weights, last: Weights, live: Weights) -> Weights:
        """What a task's head starts from: the last task's if it grows, else the base's; only what fits the live one.

        A head that has more rows by now takes what there was as its first ones.
        """
        heads = last if self.mode == "grow" else {name: base[name] for name in self.names if name in base}
        return {n: t for n, t in heads.items() if t.shape[1:] == live[n].shape[1:] and len(t) <= len(live[n])}

    def joined(self, module: nn.Module, start: Weights, classes: Sequence[int] | None) -> Weights:
        """The head after a task; if it grows, rows of other classes are as at the start."""
        live = weights.named_tensors(module)
        head = weights.copies({name: live[name] for name in self.names})
        if self.mode == "grow":
            by_class = {name: head[name] for name in head_parameters(module, None) if name in head}
            head |= join_head(by_class, start, classes)
        return head

    def calibrated(self, trainer: Any, module: LightningModule, head: Weights, samples: dict[int, Tensor]) -> Weights:
        """The head after a short training on stored samples."""
        found = calibrated_head(trainer, module, self.layer(module), samples)
        return {name: found[name.rpartition(".")[2]].to(tensor) for name, tensor in head.items()}

    def refuse_known_classes(self, classes: Sequence[int] | None, known: Weights) -> None:
        """Checks that a growing head has no rows of these classes yet.

        Args:
            classes: Of the task that begins, if its data names them.
            known: Class numbers by title of an earlier task.

        Raises:
            ValueError: If an earlier task had one of them.
        """
        of_task = set(classes or ()) if self.mode == "grow" else set()
        for task, earlier in known.items():
            if both := sorted(of_task & set(earlier.tolist())):
                raise ValueError(
                    f"class {both[0]} was in {task} already, whose rows of the head would be written over. In a"
                    " class-incremental stream no class is in two tasks; for a domain-incremental one give data without"
                    " `classes`."
                )


def classes_of(trainer: Any) -> Sequence[int] | None:
    """The classes of the task, if its data module names them."""
    classes: Sequence[int] | None = getattr(getattr(trainer, "datamodule", None), "classes", None)
    return classes


def title_of(trainer: Any, task: int) -> str:
    """What the data module calls the task, or its number."""
    return str(getattr(getattr(trainer, "datamodule", None), "task", f"task{task}"))
