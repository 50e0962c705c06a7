"""A forward pass followed symbolically, to see which axes number the same units."""

from dataclasses import dataclass
from functools import reduce
from typing import Literal, final

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.parametrize import is_parametrized

from lightning_merge.alignment._graphs import graphs, is_plain
from lightning_merge.alignment._groups import Group
from lightning_merge.alignment._operations import JOINING, KEEPING, flattens, is_mean_of_image, keeps, reaches
from lightning_merge.weights import canonical

Where = Literal["channel", "flat", "last"]


@final
@dataclass(frozen=True)
class _Value:
    """Where units are in a value: on its second axis, before others, flattened into it, or on its last one."""

    group: Group
    where: Where
    space: int = 0  # how many axes follow that of channels


def trace(module: nn.Module) -> list[Group]:
    """The groups, in the order of the forward pass; those that are fixed among them.

    Raises:
        ValueError: If ``torch.fx`` cannot follow the forward pass.
    """
    walk = _Walk(module)
    for graph in graphs(module):
        for node in graph.nodes:
            walk.values[node] = walk.step(node)
    walk.keep_what_is_read()
    return list(dict.fromkeys(group.root for group in walk.groups))


class _Walk:
    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.values: dict[fx.Node, _Value | None] = {}
        self.groups: list[Group] = []
        self._modules = dict(module.named_modules())
        self._starts: dict[nn.Module, Group | None] = {}  # of layers that were passed before, and are passed again
        self._ends: dict[nn.Module, Group] = {}
        self._owners: dict[int, tuple[str, int]] = {}
        self._axes: dict[tuple[str, int], Group] = {}
        self._read: set[int] = set()  # tensors that something else than a layer that is known computes with

    def step(self, node: fx.Node) -> _Value | None:
        """The value of a node, with what it says of groups."""
        given = [self.values.get(each) for each in node.all_input_nodes]
        if node.op == "get_attr":
            self._read.add(id(reduce(getattr, str(node.target).split("."), self._module)))
        if node.op == "call_module":
            return self._layer(self._modules[str(node.target)], canonical(str(node.target)), given)
        if node.op in ("call_function", "call_method"):
            if node.target in JOINING:
                return self._joined(node, given)
            value = given[0] if given else None
            means = is_mean_of_image(node) and value is not None and value.space != 2
            if value is not None and flattens(node) and not means:
                return self._flat(value)
            if (
                value is not None
                and keeps(node)
                and len(given) == 1
                and reaches(node.target, value.space)
                and not means
            ):
                return value
        self._fix(given)
        return None

    def _fix(self, given: list[_Value | None]) -> None:
        for value in given:
            if value is not None:
                value.group.fix()

    def _joined(self, node: fx.Node, given: list[_Value | None]) -> _Value | None:
        """A sum or a product of branches; numbers beside them change nothing."""
        known = [value for value in given if value is not None]
        if len(known) < len(given) or len({(value.where, value.space) for value in known}) != 1:
            self._fix(given)
            return None
        for other in known[1:]:
            known[0].group.join(other.group)
        return known[0]

    def _flat(self, value: _Value) -> _Value:
        return _Value(value.group, "flat") if value.where == "channel" else value

    def _layer(self, layer: nn.Module, name: str, given: list[_Value | None]) -> _Value | None:
        value = given[0] if given else None
        found = None
        if len(given) > 1 or is_parametrized(layer) or not is_plain(layer):
            pass
        elif isinstance(layer, nn.Linear):
            found = self._mixing(layer, name, value, ("flat", "last"), "last")
        elif isinstance(layer, _ConvNd):
            found = self._convolution(layer, name, value)
        elif isinstance(layer, (_BatchNorm, nn.LayerNorm)):
            found = self._norm(layer, name, value)
        elif isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) == (1, -1) and value is not None:
            found = self._flat(value)
        elif isinstance(layer, KEEPING) and not list(layer.parameters()) and value is not None:
            found = value if reaches(layer, value.space) else None
        if found is None:
            self._fix(given)
            self._read |= {id(tensor) for tensor in (*layer.parameters(), *layer.buffers())}
        return found

    def keep_what_is_read(self) -> None:
        """Fixes the units of tensors that are also computed with in some way that is not known."""
        names = {self._owners[each][0] for each in self._read & set(self._owners)}
        for group in self.groups:
            if any(name in names for name, _ in group.root.axes):
                group.fix()

    def _convolution(self, layer: _ConvNd, name: str, value: _Value | None) -> _Value | None:
        if layer.groups == 1 and not layer.transposed:
            return self._mixing(layer, name, value, ("channel",), "channel")
        depthwise = layer.groups == layer.in_channels == layer.out_channels and not layer.transposed
        if depthwise and value is not None and value.where == "channel" and value.space == layer.weight.dim() - 2:
            self._own(value.group, layer, name)
            return value
        return None

    def _mixing(
        self, layer: nn.Module, name: str, value: _Value | None, takes: tuple[Where, ...], gives: Where
    ) -> _Value:
        """A layer of which every output unit reads every input unit."""
        weight = layer.get_parameter("weight")
        space = weight.dim() - 2
        group = None if value is None else value.group.root
        if group is not None and value is not None:
            block, rest = divmod(weight.shape[1], group.size)
            fits = value.where in takes and value.space == space and not rest
            if fits and (block == 1 or value.where == "flat"):
                self._add(group, f"{name}.weight" if name else "weight", weight, 1, block)
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
        return _Value(self._ends[layer], gives, space)

    def _norm(self, layer: nn.Module, name: str, value: _Value | None) -> _Value | None:
        fits = value is not None and (
            layer.normalized_shape == (value.group.root.size,) and value.where != "channel"
            if isinstance(layer, nn.LayerNorm)
            else getattr(layer, "num_features", None) == value.group.root.size
        )
        if value is None or not fits:
            return None
        self._own(value.group, layer, name)
        return value

    def _own(self, group: Group, layer: nn.Module, name: str) -> None:
        """Every tensor of a layer that has an entry for each unit on its first axis."""
        for key, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)):
            if tensor.dim():
                self._add(group, f"{name}.{key}" if name else key, tensor, 0, tensor.shape[0] // group.root.size)

    def _add(self, group: Group, name: str, tensor: torch.Tensor, axis: int, block: int) -> None:
        """An axis; one of a layer that is passed twice is both times the same, and tied tensors keep their order."""
        owner = self._owners.setdefault(id(tensor), (name, axis))
        group.add(name, axis, block)
        self._axes.setdefault((name, axis), group).join(group)
        if owner[0] != name:
            group.fix()
            for other in self.groups:
                if any(each[0] == owner[0] for each in other.root.axes):
                    other.fix()
