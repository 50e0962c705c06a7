"""An update that has been made before it is known whether the weights were fit for it, and how it is taken back."""

from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar, cast, final, overload

import torch
from torch import Tensor

from lightning_merge import weights
from lightning_merge.weights import Finding, State, Weights

T = TypeVar("T")

_BUDGET = 0.05
"""Share of a device's memory that may be taken by what an undecided update keeps of before."""


@final
@dataclass
class Undecided:
    """What stood before an update, by reference: the update has written nothing of it, but made it anew.

    Args:
        finding: Decides.
        names: Tensors whose numbers matter.
        step: Applied steps at the update.
        state: Of the rule before it.
        buffers: The copied ones before it.
        window: First and last step before it.
    """

    finding: Finding
    names: set[str]
    step: int
    state: State | None
    buffers: Weights
    window: tuple[int, int] | None


def by_reference(nested: Any) -> Any:
    """New dicts and lists with the same tensors in them."""
    if isinstance(nested, dict):
        return {key: by_reference(value) for key, value in nested.items()}
    return [by_reference(value) for value in nested] if isinstance(nested, list) else nested


def has_room(tensors: dict[str, Tensor]) -> bool:
    """Whether one more copy of such weights on their devices is within the budget."""
    needed: dict[torch.device, int] = {}
    for tensor in weights.local(tensors).values():
        size = tensor.numel() * weights.average_dtype(tensor).itemsize
        needed[tensor.device] = needed.get(tensor.device, 0) + size
    return all(
        size <= _BUDGET * torch.cuda.get_device_properties(device).total_memory
        for device, size in needed.items()
        if device.type == "cuda"
    )


class Decided(Generic[T]):
    """An attribute that nobody sees or changes before an undecided update of its owner is decided."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._key = f"_decided_{name.strip('_')}"

    @overload
    def __get__(self, instance: None, owner: type) -> Self: ...
    @overload
    def __get__(self, instance: object, owner: type) -> T: ...
    def __get__(self, instance: Any, owner: type) -> "T | Self":
        if instance is None:
            return self
        if instance._undecided is not None or instance._background is not None:  # at every step, so no call for nothing
            instance.decide()
        return cast("T", instance.__dict__[self._key])

    def __set__(self, instance: Any, value: T) -> None:
        instance.decide()
        instance.__dict__[self._key] = value
