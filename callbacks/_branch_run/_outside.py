"""Weights that change between the turns of branches: in hooks that are called once per batch, not once per branch."""

from collections.abc import Mapping
from typing import final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

_CLOSELY = 4
"""Turns after which all numbers are looked at. Later a change is seen where torch counts it."""


@final
class Outside:
    """Notices that weights were changed between two turns, and says so once.

    Args:
        title: What messages call the branches.
        count: How many they are; of one branch nothing is said.
    """

    def __init__(self, title: str, count: int) -> None:
        self._title = title
        self._count = count
        self._marks: dict[str, tuple[Tensor, int]] = {}
        self._sums: dict[str, str] = {}
        self._looked = 0
        self._said = False

    def mark(self, live: Mapping[str, Tensor]) -> None:
        """Remembers the weights that the active branch has after its turn."""
        self._marks = {name: (tensor, tensor._version) for name, tensor in live.items()}
        self._sums = sums(live) if self._looked < _CLOSELY else {}
        self._looked += 1

    def moved(self, live: Mapping[str, Tensor], active: int) -> bool:
        """Whether any was changed since; what was replaced or unfrozen does not count."""
        marks, self._marks = self._marks, {}
        known = {n: t for n, t in live.items() if n in marks and marks[n][0] is t}
        now = sums({name: t for name, t in known.items() if name in self._sums})
        for name, tensor in known.items():
            if marks[name][1] != tensor._version or now.get(name) != self._sums.get(name):
                self.say(name, active)
                return True
        return False

    def say(self, name: str, active: int) -> None:
        """A warning, once."""
        if self._count > 1 and not self._said:
            self._said = True
            rank_zero_warn(
                f"{self._title}: `{name}` was changed between two training steps, as `on_train_batch_end` of a module"
                f" or of a callback may. Such hooks are called once per batch, not once per branch: branch {active} of"
                f" {self._count} has the change, and the others train on without it. Do it where every branch passes:"
                " in `optimizer_step` after `super().optimizer_step(...)`, or at the start of `training_step`."
            )


@torch.no_grad()
def sums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Numbers of each tensor, written out, that tell whether it has changed."""
    found = {}
    for name, tensor in tensors.items():
        flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        most = flat.abs().amax() if flat.numel() else 0
        found[name] = f"{float(flat.sum())!r}, {float(flat.square().sum())!r}, {float(most)!r}"  # a NaN is one too
    return found
