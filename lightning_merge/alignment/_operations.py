"""What operations do with the units of a value."""

import operator
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional

KEEPING = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d),
    *(nn.Dropout3d, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d),
    *(nn.Upsample, nn.UpsamplingNearest2d),
)
"""Layers that do to each unit what they do to any other."""

_SPACES: dict[Any, tuple[int, ...]] = {
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d), (1,)),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.ZeroPad2d), (2,)),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d), (3,)),
    **dict.fromkeys((functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d), (2,)),
    **{nn.Upsample: (1, 2, 3), nn.UpsamplingNearest2d: (2,)},
}

JOINING: set[Any] = {
    operator.add,
    operator.iadd,
    operator.sub,
    operator.mul,
    operator.imul,
    torch.add,
    torch.sub,
    torch.mul,
}
JOINING |= {"add", "add_", "sub", "mul", "mul_"}
"""Operations of two values, unit by unit."""

_KEEPING: set[Any] = {
    *(functional.relu, functional.relu6, functional.leaky_relu, functional.elu, functional.gelu, functional.silu),
    *(functional.tanh, functional.sigmoid, functional.hardswish, functional.softplus, functional.dropout),
    *(functional.dropout2d, functional.max_pool2d, functional.avg_pool2d, functional.adaptive_avg_pool2d),
    *(torch.relu, torch.tanh, torch.sigmoid, "relu", "relu_", "tanh", "sigmoid", "contiguous", "clone", "float"),
}
_IMAGE = {(2, 3), (-2, -1), (-1, -2), (3, 2)}


def reaches(operation: Any, space: int) -> bool:
    """Whether what pools goes along as many axes as lie behind the units, and so never along them."""
    kinds = type(operation).__mro__ if isinstance(operation, nn.Module) else (operation,)
    return all(space in _SPACES[kind] for kind in kinds if kind in _SPACES)


def keeps(node: fx.Node) -> bool:
    """Whether an operation of one value does to each unit what it does to any other."""
    return bool(node.target in _KEEPING) or is_mean_of_image(node)


def flattens(node: fx.Node) -> bool:
    """Whether an operation lays everything behind the first axis out in a row."""
    if node.target in (torch.flatten, "flatten"):
        return _arguments(node, "start_dim", "end_dim") in ((1,), (1, -1))
    if node.target in ("view", "reshape"):
        # a number in the first place may lay units of several examples in a row
        return len(node.args) == 3 and isinstance(node.args[1], fx.Node) and bool(node.args[2] == -1)
    return is_mean_of_image(node) and not _keeps_axes(node)


def is_mean_of_image(node: fx.Node) -> bool:
    """Whether it is a mean over the third and the fourth of four axes."""
    return node.target in ("mean", torch.mean) and any(
        isinstance(each, (tuple, list)) and tuple(each) in _IMAGE for each in (*node.args[1:2], node.kwargs.get("dim"))
    )


def _keeps_axes(node: fx.Node) -> bool:
    return bool(node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False))


def _arguments(node: fx.Node, *names: str) -> tuple[Any, ...]:
    given = (*node.args[1:], *(node.kwargs[name] for name in names[len(node.args) - 1 :] if name in node.kwargs))
    return tuple(given)
