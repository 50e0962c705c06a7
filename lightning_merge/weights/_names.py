"""Names of tensors, and what is said of a set of named tensors."""

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn

Weights: TypeAlias = dict[str, Tensor]
"""Named tensors. A rule never writes to the weights it is handed."""


State: TypeAlias = dict[str, Any]
"""What a rule remembers: tensors, numbers, strings, lists and dicts of them.

``torch.load(weights_only=True)`` reads it.
"""


def first_mismatch(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str | None:
    """The first difference in names or shapes, in words; ``None`` if there is none."""
    for name, tensor in expected.items():
        if name not in found:
            return f"`{name}` of shape {tuple(tensor.shape)} is missing"
        if found[name].shape != tensor.shape:
            return f"`{name}` has shape {tuple(found[name].shape)} instead of {tuple(tensor.shape)}"
    extra = next((name for name in found if name not in expected), None)
    return None if extra is None else f"`{extra}` of shape {tuple(found[extra].shape)} is not part of this model"


_WRAPPER_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def canonical(name: str) -> str:
    """The name without the parts that wrappers insert.

    Example:
        >>> canonical("net._orig_mod.0.weight")
        'net.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_PARTS)


def is_metric(module: nn.Module) -> bool:
    """Whether it is a torchmetrics metric or collection: what it holds is a measurement, not part of the model."""
    return any(cls.__module__.startswith("torchmetrics.") for cls in type(module).__mro__)


def submodules(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with its name, shared ones under each name, without torchmetrics metrics and what they hold."""
    if is_metric(module):
        return
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from submodules(child, f"{prefix}.{name}" if prefix else name)
