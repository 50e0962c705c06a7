"""Which axes of which tensors number the same hidden units."""

from dataclasses import dataclass
from typing import final

from torch import nn

from lightning_merge._checks import instance
from lightning_merge.alignment._trace import trace
from lightning_merge.weights import canonical


@final
@dataclass(frozen=True)
class Units:
    """Hidden units that may be put into any order, if it is done everywhere.

    Args:
        size: How many.
        axes: The tensors that have an entry for each, by canonical name: which axis, and how many entries of it belong
            to one unit (those of an image that was flattened before a linear layer).
    """

    size: int
    axes: dict[tuple[str, int], int]


def units(module: nn.Module) -> list[Units]:
    """The groups of hidden units of a network, found by following its forward pass symbolically.

    Followed are linear layers and convolutions (depthwise ones too), BatchNorm, LayerNorm, activations, dropout,
    pooling, flattening, sums and products of branches. What meets anything else, an input or an output keeps its order.

    Args:
        module: A network whose forward pass ``torch.fx`` can follow; it is not run.

    Returns:
        Groups with at least two units, in the order of the forward pass.

    Raises:
        ValueError: If ``torch.fx`` cannot follow the forward pass, or nothing in it can be reordered.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 1))
        >>> units(net)
        [Units(size=8, axes={('0.weight', 0): 1, ('0.bias', 0): 1, ('2.weight', 1): 1})]
    """
    instance("module", module, nn.Module, "a module")
    found = [Units(group.size, dict(group.axes)) for group in trace(module) if not group.is_fixed and group.size > 1]
    if not found:
        raise ValueError(
            f"`module` must have hidden units between layers that are known to keep them apart (linear, convolution,"
            f" BatchNorm, LayerNorm, ...), and {type(module).__name__} has none."
        )
    return found


def first_names(module: nn.Module) -> dict[str, str]:
    """The names of tensors that have several, which ``state_dict`` writes out, with the one that ``Units`` knows."""
    every = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    first: dict[int, str] = {}
    return {canonical(name): first.setdefault(id(tensor), canonical(name)) for name, tensor in every}
