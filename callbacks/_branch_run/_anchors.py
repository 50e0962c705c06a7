"""Moving averages that branches are held near."""

from collections.abc import Iterable
from typing import final

import torch
from torch import nn

from lightning_merge import weights
from lightning_merge.branches import Branches
from lightning_merge.weights import Weights


@final
class Anchors:
    """Keeps a moving average of each branch, which starts where the branches last met.

    ``anchor_j <- decay * anchor_j + (1 - decay) * w_j``.

    Args:
        decay: Share of the old anchor kept at each step, in [0, 1).

    Attributes:
        held: The anchor of each branch, in the precision of averages.
    """

    def __init__(self, decay: float) -> None:
        self.decay = decay
        self.held: dict[int, Weights] = {}

    def restart(self, branches: Branches) -> None:
        """Every branch has its anchor where it is."""
        self.held = {}
        self.complete(branches)

    def complete(self, branches: Branches) -> None:
        """What has no anchor yet, since it was just unfrozen say, has it where it is."""
        live = branches.live
        devices = {name: t.device for name, t in live.items()}
        for branch in branches.own:
            held = weights.to_devices(self.held.get(branch, {}), devices)
            own = branches.weights(branch)
            new = {name: own[name] for name, t in live.items() if isinstance(t, nn.Parameter) and name not in held}
            self.held[branch] = held | weights.to_devices(weights.clone(new), devices)

    def forget(self, names: Iterable[str]) -> None:
        """Those of tensors that were replaced."""
        for held in self.held.values():
            for name in names:
                held.pop(name, None)

    def follow(self, branches: Branches) -> None:
        """Moves the anchor of the branch that has trained."""
        weights.lerp_(self.held[branches.active], branches.live, 1 - self.decay)

    def to_host(self) -> None:
        """Follows the module to host memory."""
        self.held = weights.to_devices(self.held, torch.device("cpu"))
