"""Weights that change between the turns of branches: in hooks that are called once per batch, not once per branch."""

from collections.abc import Mapping
from operator import attrgetter
from typing import final

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_merge._ranks import gathered

_CLOSELY = 4
"""Turns after which all numbers are looked at. Later a change is seen where torch counts it."""
_VERSION = attrgetter("_version")


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
        self._marked: Mapping[str, Tensor] = {}
        self._versions: list[int] = []
        self._sums: dict[str, str] = {}
        self._looked = 0
        self._said = False

    def mark(self, live: Mapping[str, Tensor]) -> None:
        """Remembers the weights that the active branch has after its turn."""
        self._marked = live  # found anew, and not written to, when the module's tensors change
        self._versions = list(map(_VERSION, live.values()))
        self._sums = sums(live) if self._looked < _CLOSELY else {}
        self._looked += 1

    def moved(self, live: Mapping[str, Tensor], active: int) -> bool:
        """Whether any was changed since; what was replaced or unfrozen does not count."""
        marked, self._marked = self._marked, {}
        if not self._sums and list(map(_VERSION, marked.values())) == self._versions:
            return False  # as nearly always
        versions = dict(zip(marked, self._versions, strict=True))
        known = {name: tensor for name, tensor in live.items() if marked.get(name) is tensor}
        now = sums({name: t for name, t in known.items() if name in self._sums})
        for name, tensor in known.items():
            if versions[name] != tensor._version or now.get(name) != self._sums.get(name):
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


def changed_since(found: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that have changed, in whichever process.

    Args:
        found: What ``sums`` gave.
        tensors: As they are now.
    """
    now = sums(tensors)
    everywhere: list[list[str]] = gathered([name for name in now if name in found and now[name] != found[name]])
    return list(dict.fromkeys(name for each in everywhere for name in each))


@torch.no_grad()
def sums(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Numbers of each tensor, written out, that tell whether it has changed."""
    found = {}
    for name, tensor in tensors.items():
        flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        most = flat.abs().amax() if flat.numel() else 0
        found[name] = f"{float(flat.sum())!r}, {float(flat.square().sum())!r}, {float(most)!r}"  # a NaN is one too
    return found
