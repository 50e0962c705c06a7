"""Reference minus pretrained, stored dense or sparse, and read tensor by tensor so that no second model stays alive."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from lightning_merge.files._read import read
from lightning_merge.files._sets import weights_in
from lightning_merge.weights import canonical, named_tensors
from lightning_merge.weights._held import Part, held_of

Source: TypeAlias = nn.Module | Mapping[str, Tensor] | str | Path
"""A module, named tensors, or a file that torch wrote: a state dict or a checkpoint that holds one."""


@final
@dataclass
class Stored:
    """What is kept of one tensor's difference: all values of this process's part, or some with their places."""

    values: Tensor
    index: Tensor | None = None

    @classmethod
    def of(cls, dense: Tensor, index: Tensor | None, dtype: torch.dtype) -> "Stored":
        """``dense`` as it is, or only the elements at ``index``."""
        values = dense if index is None else dense[index]
        return cls(values.to(dtype, copy=index is None), index)

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return self.values.nbytes + (0 if self.index is None else self.index.nbytes)


def tensors_of(source: Source | Literal["zero"], argument: str) -> Mapping[str, Tensor] | None:
    """Named tensors of a source, on disk until they are used if it is a file; ``None`` for ``"zero"``.

    Raises:
        TypeError: If it is none of these.
        ValueError: If it is a file without named tensors, or cannot be read.
    """
    if isinstance(source, str) and source == "zero":
        return None
    if isinstance(source, nn.Module):
        return named_tensors(source)
    content: Any = source
    if isinstance(source, (str, Path)):
        try:
            content = read(source)
        except ValueError as error:
            raise ValueError(f"`{argument}`: {error}") from error
    if not isinstance(content, Mapping):
        raise TypeError(
            f"`{argument}` must be a module, named tensors or the path of a checkpoint, got {type(source).__name__}."
        )
    state = content["state_dict"] if isinstance(content.get("state_dict"), Mapping) else content
    found = {canonical(name): t for name, t in state.items() if isinstance(name, str) and isinstance(t, Tensor)}
    if isinstance(source, (str, Path)):
        found = {**found, **weights_in(content)}  # a name may begin with DDP's `module.`, or with a module of that name
    if not found:
        raise ValueError(f"`{argument}` holds no named tensors: {source if isinstance(source, (str, Path)) else ''}.")
    return found


def named(tensors: Mapping[str, Tensor], name: str, shape: torch.Size, argument: str) -> Tensor:
    """The tensor of a parameter.

    Raises:
        ValueError: If there is none of this name and shape.
    """
    if name not in tensors:
        some = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"`{argument}` lacks `{name}` of shape {tuple(shape)}, which the optimizer updates; its first names are"
            f" {some}. Give it for the same model, or exempt the parameter."
        )
    tensor = tensors[name]
    if tensor.shape != shape:
        raise ValueError(f"`{name}` has shape {tuple(tensor.shape)} in `{argument}`, and {tuple(shape)} in the model.")
    return tensor.detach()


def held_part(tensor: Tensor, whole: Part, device: torch.device, dtype: torch.dtype) -> Tensor:
    """This process's part, flat, of a tensor that may be whole or cut in the same way."""
    flat = held_of(tensor).reshape(-1)
    if flat.numel() == whole.numel:
        flat = flat[whole.start : whole.stop]
    return flat.to(device=device, dtype=dtype)


def loaded(tau: Mapping[str, Mapping[str, Any]], merged: dict[str, Tensor]) -> dict[str, Stored]:
    """The task vector that ``tau_state`` gave, where the parameters are."""
    if missing := [name for name in merged if name not in tau]:
        raise ValueError(f"`tau` lacks `{missing[0]}`, which the optimizer updates.")
    found = {}
    for name, parameter in merged.items():
        device, index = held_of(parameter).device, tau[name]["index"]
        found[name] = Stored(tau[name]["values"].to(device), None if index is None else index.to(device))
    return found


def magnitude(tau: Mapping[str, Stored], parts: Mapping[str, Part], density: float) -> float:
    """The sum of magnitudes of a stored task vector; equal on all ranks and in a resumed run.

    Raises:
        ValueError: If there is nothing to merge.
    """
    total = 0.0
    for name, kept in tau.items():
        size = kept.values.abs().sum(dtype=torch.float64).float().view(1)
        total += float(parts[name].total_(size))
    if total == 0 or not math.isfinite(total):
        what = "is 0 everywhere" if total == 0 else "holds a NaN or an infinity"
        raise ValueError(
            f"the difference of `reference` and `pretrained`, as far as density {density} keeps it, {what}, so"
            " merging would do nothing of use. Is one of them the other's file?"
        )
    return total
