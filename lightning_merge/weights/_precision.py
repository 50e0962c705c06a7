"""Precision: of which tensors a mean means something, and what it is kept in."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lightning_merge.weights._names import Weights
from lightning_merge.weights._shards import local


def is_averaged(tensor: Tensor) -> bool:
    """Whether a mean of such tensors means something: floating point or complex numbers, not integers or flags.

    Nor what only says it is floating point: packed tensors (quantised ones of torchao, say), which are classes of their
    own, and 8-bit floats, whose scale is somewhere else.
    """
    return (tensor.is_floating_point() or tensor.is_complex()) and tensor.dtype.itemsize > 1 and _is_plain(tensor)


def average_dtype(tensor: Tensor) -> torch.dtype:
    """The precision an average of such tensors is kept in: float32, or wider if the tensor is.

    In bfloat16 an exponential mean with decay 0.999 stops moving at a quarter of the way.
    """
    return torch.promote_types(tensor.dtype, torch.float32) if is_averaged(tensor) else tensor.dtype


def _is_plain(tensor: Tensor) -> bool:
    """Whether its numbers are in its storage as its dtype says, here or in parts."""
    if type(tensor) in (Tensor, nn.Parameter):
        return True
    (part,) = local({"": tensor}).values()
    return type(part.data) is Tensor


def like(weights: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> Weights:
    """The weights in the dtype and on the device of ``reference``; a tensor that fits already is not copied."""
    return {name: t.to(reference[name]) for name, t in weights.items()}


def to_devices(value: Any, devices: "Mapping[str, torch.device] | torch.device", device: Any = None) -> Any:
    """A state with every tensor on the device that its name has in ``devices``, or all on one device."""
    if isinstance(value, Tensor):
        return value if device is None else value.to(device)
    if isinstance(value, dict):
        chosen = {key: devices.get(key, device) if isinstance(devices, Mapping) else devices for key in value}
        return {key: to_devices(item, devices, chosen[key]) for key, item in value.items()}
    if isinstance(value, list):
        return [to_devices(item, devices, device) for item in value]
    return value


def work_dtype(tensor: Tensor) -> torch.dtype:
    """The precision in which updates are formed: float32, or wider if the parameter is."""
    return torch.promote_types(tensor.dtype, torch.float32)
