"""The state of a combiner and the weights of a base, as a bank writes them down."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.continual._bank_files import fingerprint
from lightning_merge.weights import State, Weights


def taken_apart(state: State) -> tuple[dict[str, Any], Weights]:
    """What a manifest holds of a state, and its tensors under names of one level."""
    groups = {key: value for key, value in state.items() if isinstance(value, dict)}
    flat = {f"{key}/{name}": tensor for key, group in groups.items() for name, tensor in group.items()}
    return {"numbers": {key: value for key, value in state.items() if key not in groups}, "groups": list(groups)}, flat


def put_together(saved: Mapping[str, Any], tensors: Weights, order: Iterable[str]) -> State:
    """The state again, with its tensors in this order: a file sorts them."""
    state: State = dict(saved["numbers"])
    for key in saved["groups"]:
        state[key] = {name: tensors[f"{key}/{name}"] for name in order}
    return state


def hashes_of(base: Mapping[str, Tensor], known: Mapping[str, str] | None, folder: Path) -> dict[str, str]:
    """A hash of each tensor of the base.

    Raises:
        ValueError: If others are known; the first that differs is named.
    """
    hashes = {name: fingerprint({name: tensor.detach().cpu()}) for name, tensor in base.items()}
    known = known or hashes
    for name in [*known, *hashes]:
        if known.get(name) != hashes.get(name):
            there, here = (found.get(name, "of no tensor")[:16] for found in (known, hashes))
            raise ValueError(
                f"the bank {folder} is of another base: `{name}` has hash {there} in it and {here} here. Its"
                " vectors add up only on the weights they were measured against."
            )
    return hashes


def layout_of(vector: Weights) -> dict[str, Any]:
    """What a manifest holds of the names, dtypes and shapes of a vector."""
    return {name: [str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in vector.items()}


def empty_of(layout: Mapping[str, Any]) -> Weights:
    """Tensors of a layout, without content."""
    return {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in layout.items()}
