"""Layouts that many libraries write: a state dict under a key, alone, or several under keys of their own."""

import os
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_merge.files._sets import (
    DDP,
    StoredSet,
    WeightFile,
    holds_numbers,
    is_average_name,
    is_extra,
    stored,
    tensors,
)

Location: TypeAlias = str | os.PathLike[str]


def file_of(path: Location, kind: str, sets: dict[str, StoredSet], content: Any) -> WeightFile:
    """A file whose default is the first of its sets."""
    return WeightFile(path, kind, sets, next(iter(sets)), content)


def one_state_dict(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """``{"state_dict": ...}``, as Lightning and most others write it."""
    if not isinstance(content.get("state_dict"), Mapping):
        return None
    is_theirs = "pytorch-lightning_version" in content
    sets = {"weights": stored(content["state_dict"], "in `state_dict`", of_lightning=is_theirs)}
    return file_of(path, "a plain Lightning checkpoint" if is_theirs else "a checkpoint", sets, content)


def flat(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """A state dict alone."""
    if not _is_state_dict(content):
        return None
    return file_of(path, "a state dict", {"weights": stored(content, "the whole file")}, content)


def nested(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """Any other dict of state dicts, as ``{"model": ..., "model_ema": ...}``; also one in another."""
    found = _sets_in(content)
    for key, value in content.items() if not found else ():
        if isinstance(value, Mapping) and not _is_of_optimizer(str(key)):
            found |= {f"{key}.{name}": inner for name, inner in _sets_in(value, f"{key}.").items()}
    if not found:
        return None
    averages = [name for name in found if is_average_name(name)]
    return WeightFile(path, "a dict of state dicts", found, [*averages, *found][0], content, by_key=True)


def _sets_in(content: Mapping[Any, Any], before: str = "") -> dict[str, StoredSet]:
    found: dict[str, StoredSet] = {}
    for key, value in content.items():
        if not isinstance(value, Mapping) or _is_of_optimizer(str(key)):
            continue
        where = f"in `{before}{key}`"
        if "n_averaged" in value and (average := stripped(value, DDP)):
            found[str(key)] = stored(average, where, count(value["n_averaged"]))
        elif _is_state_dict(value):
            found[str(key)] = stored(value, where)
    return found


def _is_of_optimizer(key: str) -> bool:
    return any(word in key.lower() for word in ("optim", "scheduler", "scaler"))


def beside_others(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """A state dict with other entries among its tensors."""
    found = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not any(tensor.is_floating_point() for tensor in found.values()) or any(map(_is_holder, content.values())):
        return None
    return file_of(path, "a state dict beside other entries", {"weights": stored(found, "among them")}, content)


def _is_holder(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and len(value) > 0


def _is_state_dict(value: Any) -> bool:
    """Whether it is tensors by name, and perhaps what modules keep beside them."""
    if not isinstance(value, Mapping):
        return False
    named = {str(name): item for name, item in value.items() if not is_extra(str(name))}
    return bool(named) and all(isinstance(item, Tensor) for item in named.values()) and _has_names(value)


def _has_names(value: Mapping[Any, Any]) -> bool:
    """Whether keys are texts, and more than bytes of a generator's state stands there."""
    return all(isinstance(name, str) for name in value) and any(t.dtype != torch.uint8 for t in tensors(value).values())


def stripped(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """What has a prefix, without it; nothing if there is no tensor among it."""
    found = {str(name).removeprefix(prefix): item for name, item in state.items() if str(name).startswith(prefix)}
    return found if tensors(found) else {}


def count(value: Any) -> int | None:
    """How many updates a file says there were, as a number."""
    unknown = value is None or not holds_numbers({"": value})
    return None if unknown else int(value)
