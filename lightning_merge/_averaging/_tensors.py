"""Which live tensors an average merges, looked up again whenever the module has others."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from lightning_merge import weights
from lightning_merge._averaging._elsewhere import Taken
from lightning_merge._averaging._undecided import has_room
from lightning_merge.selections import Selection
from lightning_merge.weights import Inventory, Weights


class Watched(Protocol):
    """What knows the tensors of a module as they are now."""

    inventory: Inventory

    @property
    def singular_vectors(self) -> set[str]:
        """Names of the buffers that spectral normalisation iterates."""


@dataclass
class Change:
    """What is different since the last look.

    Args:
        gone: Names that are not averaged any more.
        fresh: Tensors that are averaged from here on.
    """

    gone: list[str] = field(default_factory=list)
    fresh: dict[str, Tensor] = field(default_factory=dict)


class Tensors:
    """The tensors of a module that go through a rule, and those that are copied at each update.

    Args:
        title: What messages call the average.
        selection: Which are merged, and what becomes of buffers.
        on_host: Whether the average is to be in host memory.
        inform: Says a sentence to the user.

    Attributes:
        averaged: Those that go through the rule, as the module has them: parameters and averaged buffers.
        copied: Those that are copied.
        is_sharded: Whether this process holds a part only of some.
    """

    def __init__(self, title: str, selection: Selection, on_host: bool, inform: Callable[[str], None]) -> None:
        self.title = title
        self._inform = inform
        self.selection = selection
        self._on_host = on_host
        self.averaged: dict[str, Tensor] = {}
        self.copied: dict[str, Tensor] = {}
        self._shapes: dict[str, torch.Size] = {}  # of the averaged ones at the last look
        self.is_sharded = False
        self._checked: weights.Fixed | None = None  # as long as the module has these tensors
        self._has_room: bool | None = None
        self._no_mean: set[str] = set()  # copied whatever the selection says
        self._said: set[str] = set()  # replaced, as the user knows

    @property
    def live(self) -> Weights:
        """The averaged ones, of sharded ones the part that is here."""
        # At each use: FSDP may give a parameter another storage in the first forward pass.
        return weights.local(self.averaged) if self.is_sharded else self.averaged

    @property
    def live_copied(self) -> Weights:
        """The copied ones, of sharded ones the part that is here."""
        return weights.local(self.copied) if self.is_sharded else self.copied

    @property
    def is_elsewhere(self) -> bool:
        """Whether the average is in host memory and the weights are not."""
        return self._on_host and any(not t.is_cpu for t in (*self.averaged.values(), *self.copied.values()))

    @property
    def devices(self) -> dict[str, torch.device]:
        """Where the average of each tensor is, or its copy."""
        found = {**self.averaged, **self.copied}
        return {name: torch.device("cpu") if self.is_elsewhere else t.device for name, t in found.items()}

    def taken(self) -> Taken:
        """The live ones as a rule takes them in: where the average is."""
        if not self.is_elsewhere:
            return Taken(self.live, self.live_copied)
        taken = self.sent()
        taken.way.wait()
        return taken

    def sent(self) -> Taken:
        """Copies of the live ones, on their way into host memory."""
        return Taken.to_host(self.live, self.live_copied)

    @property
    def has_room(self) -> bool:
        """Whether there is room for the average before an update beside the one after it."""
        if self._has_room is None:
            self._has_room = has_room({**self.averaged, **self.copied})
        return self._has_room

    @property
    def checked(self) -> Weights:
        """All but those that held an infinity from the start, as masks and bounds do."""
        if self.is_sharded:
            return self._all_but_no_mean()
        if self._checked is None:
            self._checked = weights.Fixed(self._all_but_no_mean())
        return self._checked

    def _all_but_no_mean(self) -> Weights:
        found = {**self.live, **self.live_copied}
        return {name: t for name, t in found.items() if name not in self._no_mean} if self._no_mean else found

    def start(self, module: Watched, known: Iterable[str], copied_before: Iterable[str]) -> None:
        """Looks them up for a fit.

        Args:
            module: Knows the module's tensors.
            known: Names that were averaged before: what was averaged once stays so, if it is frozen too.
            copied_before: Names of copied tensors of an earlier fit or a file.

        Raises:
            ValueError: If no parameter is selected.
        """
        self.averaged, self.copied = {}, {}
        self.selection.parameters(module.inventory)
        self._no_mean |= set(copied_before) - self.selection.copied_buffers(module.inventory).keys()
        self._look_up(module, set(known))

    def follow(self, module: Watched, steps: int) -> Change:
        """Looks them up again.

        Args:
            module: Knows the module's tensors.
            steps: Applied steps so far, for messages.

        Raises:
            ValueError: If a parameter has gone or has another shape.
        """
        before, shapes = self.averaged, self._shapes
        self._look_up(module, set(before))
        gone = [name for name in before if name not in self.averaged]
        self._let_go([n for n in gone if n not in module.inventory.aliases and n not in self.copied], before, steps)
        anew = [
            name
            for name, tensor in self.averaged.items()
            if name in before and _is_another(before[name], shapes[name], tensor)
        ]
        for name in anew:
            self._start_anew(name, shapes[name], steps)
        fresh = {name: t for name, t in self.averaged.items() if name not in before or name in anew}
        return Change(gone, fresh)

    def _look_up(self, module: Watched, known: set[str]) -> None:
        inventory = module.inventory
        names = known | self.selection.chosen(inventory).keys() | self.selection.averaged_buffers(inventory).keys()
        new = {name: t for name, t in inventory.tensors.items() if name in names and name not in self.averaged}
        # No mean is right of masks and bounds, which hold an infinity before anything is trained, nor of the vectors of
        # spectral normalisation, which are iterated under the merged weights.
        buffers = self.selection.copied_buffers(inventory)
        new |= {name: buffer for name, buffer in buffers.items() if name not in self.copied}
        constant = weights.local({name: t for name, t in new.items() if not t.requires_grad})
        self._no_mean |= new.keys() & (module.singular_vectors | weights.nonfinite(constant))
        copied = buffers.keys() | (self._no_mean & names)
        self.copied = {name: t for name, t in inventory.tensors.items() if name in copied}
        self.averaged = {name: t for name, t in inventory.tensors.items() if name in names - copied}
        self._shapes = {name: tensor.shape for name, tensor in self.averaged.items()}
        self._checked = self._has_room = None
        self.is_sharded = any(map(weights.is_sharded, (*self.averaged.values(), *self.copied.values())))

    def _let_go(self, gone: list[str], before: dict[str, Tensor], steps: int) -> None:
        for name in gone:
            if isinstance(before[name], torch.nn.Parameter):
                raise ValueError(
                    f"{self.title} averages `{name}`, which the module does not have any more after step {steps}: it"
                    " was removed or renamed, as pruning, parametrizations and adapters do. Make that change before"
                    f" the fit, or leave the parameter out: `selection=Selection(exclude=[{name!r}])`."
                )
            self._inform(f"{self.title}: the buffer `{name}` has gone after step {steps}; so is its average.")

    def _start_anew(self, name: str, before: torch.Size, steps: int) -> None:
        now = self.averaged[name]
        if isinstance(now, torch.nn.Parameter) and now.shape != before:
            raise ValueError(
                f"{self.title} averages `{name}`, which was replaced after step {steps} and has shape"
                f" {tuple(now.shape)} instead of {tuple(before)}: numbers that come and go have no average. Leave"
                f" it out: `selection=Selection(exclude=[{name!r}])`."
            )
        if name not in self._said:
            self._said.add(name)
            self._inform(f"{self.title}: `{name}` was replaced after step {steps}; its average starts anew.")


def _is_another(before: Tensor, shape: torch.Size, now: Tensor) -> bool:
    """Whether a tensor has to be averaged anew; a buffer of the same shape that is assigned goes on."""
    if weights.is_sharded(now):
        return False
    return now.shape != shape or (now is not before and isinstance(now, torch.nn.Parameter))
