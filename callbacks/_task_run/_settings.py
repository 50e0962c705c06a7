"""What is the same for all tasks of a stream."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

from torch import nn

from lightning_merge import weights
from lightning_merge.callbacks._task_run._heads import Heads
from lightning_merge.callbacks._task_run._low_rank import LowRank
from lightning_merge.callbacks._task_run._store import Store
from lightning_merge.combiners._vectors import refuse_unfit
from lightning_merge.selections import Selection


@final
@dataclass(frozen=True)
class Settings:
    """What is the same for all tasks of a stream.

    Attributes:
        store: The stream's folder.
        head: Globs of the head's parameters; ``None`` to look for it.
        heads: What a task makes of the head.
        selection: Which other parameters are merged, and what becomes of buffers.
        lora: Adapters that are trained in the place of weights, if any are.
        samples_per_class: Samples of a class that are stored; 0 for none.
    """

    store: Store
    head: Sequence[str] | None
    heads: Heads
    selection: Selection
    lora: LowRank | None
    samples_per_class: int

    @property
    def needs_head_early(self) -> str:
        """Why the head has to be known before there is a batch; empty if it has not."""
        if self.lora is not None:
            return "adapters had to be put on all other layers before training"
        return "`heads='freeze'` had to freeze it before training" if self.heads == "freeze" else ""

    def merged(self, module: nn.Module, head: Sequence[str]) -> list[str]:
        """The parameters that are merged.

        Raises:
            ValueError: If there are none, or one cannot be merged.
        """
        chosen = [name for name in self.selection.parameters(module) if name not in head]
        names = list(self.lora.targets(module, chosen)) if self.lora else chosen
        if not names:
            frozen = sorted(self.named(module) - set(head))
            cure = ""
            if frozen and self.selection.trainable:
                cure = (
                    f" `{frozen[0]}` and {len(frozen) - 1} more are frozen: if they are trained later in the fit, or in"
                    " a later task, choose `selection=Selection(buffers='recompute')`, which merges frozen ones too."
                )
            raise ValueError(f"there is nothing to merge: {self.selection} leaves only the head, {list(head)}.{cure}")
        live = weights.named_parameters(module)
        refuse_unfit({name: live[name] for name in names}, "of the model")  # now, not after the task
        return names

    def named(self, module: nn.Module) -> set[str]:
        """The parameters that the selection names, frozen or not."""
        return set(replace(self.selection, trainable=False).chosen(weights.Inventory(module)))

    def trained_later(self, name: str) -> ValueError:
        """What is said of a parameter that is trained and was not in the first task."""
        return ValueError(
            f"other parameters are trained than in the first task of the bank {self.store.folder}: `{name}` was frozen"
            " then, or left out, so no vector has it. Freeze it, leave it out (`selection=Selection(exclude=...)`), or"
            " begin a new `bank` with `Selection(buffers='recompute')`, whose vectors have frozen parameters too."
        )
