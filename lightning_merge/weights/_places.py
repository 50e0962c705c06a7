"""Places: every tensor of a module under every one of its names."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lightning_merge.weights._memory import is_in_memory

Kind = Literal["parameter", "buffer", "passing", "attribute"]
"""Of a tensor: ``passing`` is a buffer that is not saved, ``attribute`` an ordinary attribute of a module."""


class Place(NamedTuple):
    """A tensor of a module under one of its names."""

    name: str
    """As the module has it, with the parts that wrappers insert."""
    tensor: Tensor
    kind: Kind


def places_of(owners: Sequence[tuple[str, nn.Module]]) -> Iterator[Place]:
    for prefix, owner in owners:
        path = f"{prefix}." if prefix else ""
        passing = getattr(owner, "_non_persistent_buffers_set", ())  # a scripted module has none
        for key, parameter in owner._parameters.items():
            if parameter is not None and not isinstance(parameter, UninitializedTensorMixin):
                yield Place(path + key, parameter, "parameter")
        for key, buffer in owner._buffers.items():
            if buffer is not None and not isinstance(buffer, UninitializedTensorMixin):
                yield Place(path + key, buffer, "passing" if key in passing else "buffer")
        for key, value in owner.__dict__.items():
            for tensor in value if isinstance(value, list | tuple) else (value,):
                if isinstance(tensor, Tensor) and tensor.grad_fn is None and is_in_memory(tensor):
                    yield Place(path + key, tensor, "attribute")
