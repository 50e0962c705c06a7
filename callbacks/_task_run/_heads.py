"""The head of a stream's model: frozen, one for each task, or one that grows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge.callbacks._task_run._stored_samples import calibrated_head
from lightning_merge.continual import join_head
from lightning_merge.weights import Weights

Heads = Literal["freeze", "per_task", "grow"]


@final
@dataclass(frozen=True)
class Head:
    """Names the head's parameters and says what a task makes of them.

    Attributes:
        names: Canonical names of its parameters.
        mode: ``"freeze"``, ``"per_task"`` or ``"grow"``, as of ``ContinualMerging``.
        by_class: Those of the names that have a row for each class, where the data names classes.
    """

    names: list[str]
    mode: Heads
    by_class: tuple[str, ...] = ()

    def describe(self) -> str:
        """What it is, for a line at the start of a fit."""
        if not self.names:
            return "there is no head"
        rows = f", rows by class: {_listed(self.by_class)}" if 0 < len(self.by_class) < len(self.names) else ""
        return f"the head ({self.mode}) is {_listed(self.names)}{rows}"

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

    def start(self, base: Weights, last: Weights, live: Mapping[str, Tensor]) -> Weights:
        """What a task's head starts from: the last task's if it grows, else the base's; only what fits the live one.

        A head that has more rows by now takes what there was as its first ones.
        """
        heads = last if self.mode == "grow" else {name: base[name] for name in self.names if name in base}
        return {name: tensor for name, tensor in heads.items() if name in live and _fits(tensor, live[name])}

    def joined(self, module: nn.Module, start: Weights, classes: Sequence[int] | None) -> Weights:
        """The head after a task; if it grows, rows of other classes are as at the start."""
        live = weights.named_tensors(module)
        head = weights.copies({name: live[name] for name in self.names})
        if self.mode == "grow":
            head |= join_head({name: head[name] for name in self.by_class}, start, classes)
        return head

    def calibrated(self, trainer: Any, module: LightningModule, head: Weights, samples: dict[int, Tensor]) -> Weights:
        """The head after a short training on stored samples."""
        found = calibrated_head(trainer, module, self.layer(module), samples)
        return {name: found[name.rpartition(".")[2]].to(tensor) for name, tensor in head.items()}


def put_head(live: Mapping[str, Tensor], name: str, tensor: Tensor) -> None:
    """Writes a parameter of the head; of one that has more rows by now the first ones."""
    target = live[name].detach()
    (target[: len(tensor)] if tensor.dim() else target).copy_(tensor)


def _fits(tensor: Tensor, live: Tensor) -> bool:
    if not tensor.dim() or not live.dim():
        return tensor.shape == live.shape
    return tensor.shape[1:] == live.shape[1:] and len(tensor) <= len(live)


def _listed(names: Sequence[str], most: int = 6) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(f"`{name}`" for name in names[:most]) + more
