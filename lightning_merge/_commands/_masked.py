"""Checkpoints of pruned models, with zeros in the same places."""

from lightning_merge._commands._aligned import in_memory
from lightning_merge._sparse import Masks, is_pruned, zero_in_any
from lightning_merge.trajectory import Trajectory


def masked(trajectory: Trajectory, masks: Masks) -> Trajectory:
    """The checkpoints as they are, if their zeros are the same, or in host memory, with the zeros of all in each.

    Raises:
        ValueError: If zeros have to be kept, and are not the same in all.
    """
    names = [name for name, like in trajectory[0].like.items() if is_pruned(name, like)]
    if masks == "keep":
        for name in names:
            zero_in_any(name, [each.tensor(name) for each in trajectory], masks)
        return trajectory
    models = [each.weights() for each in trajectory]
    for name in names:
        zeros = zero_in_any(name, [model[name] for model in models], masks)
        for model in models:
            model[name] = model[name].masked_fill(zeros, 0)
    found = Trajectory(in_memory(each, model) for each, model in zip(trajectory, models, strict=True))
    found.left_out = trajectory.left_out
    return found
