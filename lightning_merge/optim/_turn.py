"""One merge, and one tensor at it."""

from dataclasses import dataclass

import torch

from lightning_merge.optim._blocks import Draw
from lightning_merge.optim._task_vector import Stored
from lightning_merge.weights._held import Part


@dataclass(frozen=True)
class Moment:
    """What is the same for all tensors of a group at one merge.

    Attributes:
        update: Share of the policy's update that is applied, ``1 - alpha``.
        reference: What the task vector is multiplied by; 0 when it is not its turn.
        decay: Learning rate times decoupled weight decay.
        dither: What is added before cutting off, in last places, in [0, 1); see ``add_``.
        dtype: The parameters'.
    """

    update: float
    reference: float
    decay: float
    dither: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Turn(Moment):
    """One tensor at one merge: what the rule needs to know."""

    name: str
    part: Part
    tau: Stored
    draw: Draw
