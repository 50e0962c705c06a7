"""Checkpoints of runs from different starts, with hidden units in the order of the first."""

import copy
from typing import TYPE_CHECKING

from lightning_merge.alignment import align
from lightning_merge.files._lazy import Checkpoint
from lightning_merge.files._places import Place
from lightning_merge.trajectory import Trajectory
from lightning_merge.weights import Weights, canonical

if TYPE_CHECKING:
    from torch import nn


def aligned(trajectory: Trajectory, module: "nn.Module") -> Trajectory:
    """The checkpoints, all but the first in host memory.

    Raises:
        ValueError: If their names are not the module's, or its forward pass cannot be followed.
    """
    first = trajectory[0].weights()
    keys = {canonical(name): name for name in module.state_dict()}
    found = [trajectory[0]]
    for each in list(trajectory)[1:]:
        named = {keys.get(name, name): tensor for name, tensor in each.weights().items()}
        ordered = align(module, named, to={keys.get(name, name): tensor for name, tensor in first.items()})
        found.append(in_memory(each, {canonical(name): tensor for name, tensor in ordered.items()}))
    other = Trajectory(found)
    other.left_out = trajectory.left_out
    return other


def in_memory(checkpoint: Checkpoint, weights: Weights) -> Checkpoint:
    """The same file, with other numbers."""
    other = copy.copy(checkpoint)
    memory = {name: tensor.contiguous() for name, tensor in weights.items()}
    other._memory = memory
    other.places = {
        name: Place(tensor.data_ptr(), tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)
        for name, tensor in memory.items()
    }
    return other
