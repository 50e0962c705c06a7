"""A forward pass followed symbolically, to see which axes number the same units."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from lightning_merge.alignment._groups import Group
from lightning_merge.alignment._operations import JOINING, KEEPING, flattens, keeps
from lightning_merge.weights import canonical

Where = Literal["channel", "flat", "last"]


@final
@dataclass(frozen=True)
class _Value:
    """Where units are in a value: on its second axis, flattened into it, or on its last one."""

    group: Group
    where: Where


def trace(module: nn.Module) -> list[Group]:
    """The groups, in the order of the forward pass; those that are fixed among them.

    Raises:
        ValueError: If ``torch.fx`` cannot follow the forward pass.
    """
    try:
        graph = _Tracer().trace(module)
    except Exception as error:
        raise ValueError(
            f"the forward pass of {type(module).__name__} cannot be followed symbolically: {error}. Give the part of it"
            " that has no branches on values, as `module.net`."
        ) from error
    walk = _Walk(module)
    for node in graph.nodes:
        walk.values[node] = walk.step(node)
    return list(dict.fromkeys(group.root for group in walk.groups))


class _Tracer(fx.Tracer):
    """Goes into every module but the layers that are known, also those of other packages that subclass them."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Linear, _ConvNd, _BatchNorm, nn.LayerNorm)) or super().is_leaf_module(
            m, module_qualified_name
        )


class _Walk:
    def __init__(self, module: nn.Module) -> None:
        self.values: dict[fx.Node, _Value | None] = {}
        self.groups: list[Group] = []
        self._modules = dict(module.named_modules())
        self._starts: dict[nn.Module, Group | None] = {}  # of layers that were passed before, and are passed again
        self._ends: dict[nn.Module, Group] = {}
        self._owners: dict[int, tuple[str, int]] = {}

    def step(self, node: fx.Node) -> _Value | None:
        """The value of a node, with what it says of groups."""
        given = [self.values.get(each) for each in node.all_input_nodes]
        if node.op == "call_module":
            return self._layer(self._modules[str(node.target)], canonical(str(node.target)), given[0])
        if node.op in ("call_function", "call_method"):
            if node.target in JOINING:
                return self._joined(node, given)
            if flattens(node) and given and given[0] is not None:
                return self._flat(given[0])
            if keeps(node) and len(given) == 1:
                return given[0]
        self._fix(given)
        return None

    def _fix(self, given: list[_Value | None]) -> None:
        for value in given:
            if value is not None:
                value.group.fix()

    def _joined(self, node: fx.Node, given: list[_Value | None]) -> _Value | None:
        """A sum or a product of branches; numbers beside them change nothing."""
        known = [value for value in given if value is not None]
        if len(known) < len(given) or len({value.where for value in known}) != 1:
            self._fix(given)
            return None
        for other in known[1:]:
            known[0].group.join(other.group)
        return known[0]

    def _flat(self, value: _Value) -> _Value:
        return _Value(value.group, "flat") if value.where == "channel" else value

    def _layer(self, layer: nn.Module, name: str, value: _Value | None) -> _Value | None:
        if is_parametrized(layer):
            self._fix([value])
            return None
        if isinstance(layer, nn.Linear):
            return self._mixing(layer, name, value, ("flat", "last"), "last")
        if isinstance(layer, _ConvNd):
            return self._convolution(layer, name, value)
        if isinstance(layer, (_BatchNorm, nn.LayerNorm)):
            return self._norm(layer, name, value)
        if isinstance(layer, nn.Flatten):
            return None if value is None else self._flat(value)
        if isinstance(layer, KEEPING) and not list(layer.parameters()):
            return value
        self._fix([value])
        return None

    def _convolution(self, layer: _ConvNd, name: str, value: _Value | None) -> _Value | None:
        if layer.groups == 1 and not layer.transposed:
            return self._mixing(layer, name, value, ("channel",), "channel")
        depthwise = layer.groups == layer.in_channels == layer.out_channels
        if depthwise and value is not None and value.where == "channel":
            self._own(value.group, layer, name)
            return value
        self._fix([value])
        return None

    def _mixing(
        self, layer: nn.Module, name: str, value: _Value | None, takes: tuple[Where, ...], gives: Where
    ) -> _Value:
        """A layer of which every output unit reads every input unit."""
        weight = layer.get_parameter("weight")
        group = None if value is None else value.group.root
        if group is not None and value is not None:
            if value.where in takes and weight.shape[1] % group.size == 0:
                self._add(group, f"{name}.weight" if name else "weight", weight, 1, weight.shape[1] // group.size)
            else:
                group.fix()
        if layer not in self._ends:
            self._starts[layer], self._ends[layer] = group, Group(weight.shape[0])
            self.groups.append(self._ends[layer])
            self._own(self._ends[layer], layer, name)
        elif group is not None and (start := self._starts[layer]) is not None:
            start.join(group)
        else:
            self._fix([value])
            if (start := self._starts[layer]) is not None:
                start.fix()
        return _Value(self._ends[layer], gives)

    def _norm(self, layer: nn.Module, name: str, value: _Value | None) -> _Value | None:
        fits = value is not None and (
            layer.normalized_shape == (value.group.root.size,) and value.where != "channel"
            if isinstance(layer, nn.LayerNorm)
            else getattr(layer, "num_features", None) == value.group.root.size
        )
        if value is None or not fits:
            self._fix([value])
            return None
        self._own(value.group, layer, name)
        return value

    def _own(self, group: Group, layer: nn.Module, name: str) -> None:
        """Every tensor of a layer that has an entry for each unit on its first axis."""
        for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.dim():
                self._add(group, f"{name}.{key}" if name else key, tensor, 0, tensor.shape[0] // group.root.size)

    def _add(self, group: Group, name: str, tensor: torch.Tensor, axis: int, block: int) -> None:
        """An axis; of a tensor that is tied to another layer's, both keep their order."""
        owner = self._owners.setdefault(id(tensor), (name, axis))
        group.add(name, axis, block)
        if owner[0] != name:
            group.fix()
            for other in self.groups:
                if any(each[0] == owner[0] for each in other.root.axes):
                    other.fix()
