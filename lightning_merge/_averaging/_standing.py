"""How an average stands beside the weights that train."""

from collections.abc import Mapping

import torch.distributed as dist
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge._averaging._rule_average import RuleAverage


def squared_distance(
    merged: Mapping[str, Tensor] | None, raw: Mapping[str, Tensor], placed: Mapping[str, Tensor], is_sharded: bool
) -> Tensor | None:
    """Squared distance of merged parameters from those that train: a number on a device; ``None`` without any.

    Args:
        merged: Parameters and buffers, on the devices of the others.
        raw: Those that train, by the same names; of sharded ones the part that is here.
        placed: The same as the module has them.
        is_sharded: Whether the sum over all processes is to be that of whole tensors.
    """
    if merged is None:
        return None
    parameters = {name: tensor for name, tensor in merged.items() if isinstance(placed.get(name), nn.Parameter)}
    return weights.squared_distance(parameters, raw, placed if is_sharded else None)


def standing(average: RuleAverage, raw: Mapping[str, Tensor], is_sharded: bool) -> dict[str, float]:
    """``updates``, ``distance``, ``start_share`` and ``decay``, as far as they are known; empty before an update.

    Args:
        average: By a rule.
        raw: The weights that train, by canonical name.
        is_sharded: Whether parameters are; all processes then call this.
    """
    found = average.health()
    square = squared_distance(average.at_hand(), raw, average.captured, is_sharded) if found else None
    if square is not None:
        if is_sharded:
            dist.all_reduce(square)
        found["distance"] = float(square.sqrt())
    return found
