"""Gram matrices of what layers are called on."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self, TypeAlias, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_merge.importance._squared import mean_by_count_
from lightning_merge.weights import Weights, average_dtype, submodules

_PIECE = 2**24
"""Numbers of patches that are in memory at a time."""

_Convolution: TypeAlias = nn.Conv1d | nn.Conv2d


@final
class InputGrams:
    """Inside, sums up ``x x^T`` over the inputs of linear layers, and over the patches that convolutions take.

    Args:
        module: Its layers are looked at.
        parameters: Those whose statistics are asked for, by canonical name.
        most_inputs: Layers with more inputs are left out: a matrix holds the square of that.

    Attributes:
        left_out: Why a parameter has none, by its name.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], most_inputs: int) -> None:
        self._layers: dict[nn.Linear | _Convolution, str] = {}
        self._sums: Weights = {}
        self._rows: Counter[str] = Counter()
        self._hooks: list[RemovableHandle] = []
        names = {id(parameter): name for name, parameter in parameters.items()}
        self.left_out = dict.fromkeys(parameters, "no weight of a linear layer or a convolution")
        for _, layer in submodules(module):
            weight = layer._parameters.get("weight")
            if (
                weight is None
                or (name := names.get(id(weight))) is None
                or not isinstance(layer, nn.Linear | _Convolution)
            ):
                continue
            if reason := _why_not(layer, weight, most_inputs):
                self.left_out[name] = reason
            else:
                self._layers[layer] = name  # several may share a weight
                self.left_out.pop(name, None)

    @property
    def found(self) -> bool:
        """Whether there is a layer to measure."""
        return bool(self._layers)

    def __enter__(self) -> Self:
        self._hooks = [layer.register_forward_pre_hook(self._note) for layer in self._layers]
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def _note(self, layer: Any, given: tuple[Any, ...]) -> None:
        name, total = self._layers[layer], self._sum_of(layer)
        with torch.autocast(total.device.type, enabled=False):
            for inputs in _inputs(layer, given[0].detach().to(total)):
                total.addmm_(inputs.T, inputs)
                self._rows[name] += len(inputs)

    def means(self) -> Weights:
        """Of each layer that was called the mean over inputs, over all processes, all of which call it."""
        for name, layer in {name: layer for layer, name in self._layers.items()}.items():
            if not mean_by_count_({name: self._sum_of(layer)}, self._rows[name]):
                self.left_out[name] = "its layer was not called by its own `forward`"
                del self._sums[name]
        return self._sums

    def _sum_of(self, layer: nn.Linear | _Convolution) -> Tensor:
        name, weight = self._layers[layer], layer.weight.detach()
        if name not in self._sums:
            size = math.prod(weight.shape[1:])
            self._sums[name] = weight.new_zeros(size, size, dtype=average_dtype(weight))
        return self._sums[name]


def _why_not(layer: nn.Module, weight: Tensor, most_inputs: int) -> str | None:
    size = math.prod(weight.shape[1:])
    if getattr(layer, "groups", 1) != 1:
        return f"a convolution in {layer.groups} groups"
    if size > most_inputs:
        return f"{size:,} inputs, more than {most_inputs:,}"
    return None


def _inputs(layer: nn.Linear | _Convolution, given: Tensor) -> Iterator[Tensor]:
    """What a layer multiplies its weight with, in rows, a piece at a time."""
    if isinstance(layer, nn.Linear):
        yield given.reshape(-1, given.shape[-1])
        return
    images = given if given.ndim == layer.weight.ndim else given[None]
    size = math.prod(layer.weight.shape[1:]) * math.prod(images.shape[2:])
    for piece in torch.split(images, max(1, _PIECE // max(1, size))):
        for patches in _patches(layer, piece):
            yield patches.T  # a view: to copy them takes as long as to find them


def _patches(layer: _Convolution, images: Tensor) -> Tensor:
    """Of shape (images, in * kernel, patches)."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    images = nn.functional.pad(images, layer._reversed_padding_repeated_twice, mode)
    settings = [layer.kernel_size, layer.dilation, layer.stride]
    if isinstance(layer, nn.Conv1d):
        images, settings = images[:, :, None], [(1, *each) for each in settings]
    kernel, dilation, stride = settings
    return nn.functional.unfold(images, kernel, dilation=dilation, stride=stride)
