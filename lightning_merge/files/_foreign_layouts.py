"""Layouts of files that other libraries write, each recognised by its keys."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_merge.files._ours import ours
from lightning_merge.files._read import read
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


def of_lightning(content: Mapping[str, Any]) -> WeightFile | None:
    """The sets of a checkpoint of one of Lightning's averaging callbacks, if it is one."""
    path = "the checkpoint"
    return _lightning_weight_averaging(content, path) or _lightning_stochastic_averaging(content, path)


def _lightning_weight_averaging(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not all(key in content for key in ("state_dict", "current_model_state", "averaging_state")):
        return None
    updates = _int(content["averaging_state"].get("n_averaged"))
    sets = {
        "average": stored(content["state_dict"], "in `state_dict`", updates, of_lightning=True),
        "raw": stored(content["current_model_state"], "in `current_model_state`", of_lightning=True),
    }
    return file_of(path, "a checkpoint of Lightning's WeightAveraging callback", sets, content)


def _lightning_stochastic_averaging(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    for key, state in content.get("callbacks", {}).items():
        if key.partition("{")[0] == "StochasticWeightAveraging" and "average_model_state" in state:
            sets = {"raw": stored(content["state_dict"], "in `state_dict`", of_lightning=True)}
            if state["n_averaged"] and state["average_model_state"] is not None:
                where = f"in `callbacks`, `{key}`"
                updates = _int(state["n_averaged"])
                sets["average"] = stored(state["average_model_state"], where, updates, of_lightning=True)
            return file_of(path, "a checkpoint of Lightning's StochasticWeightAveraging callback", sets, content)
    return None


def _mmengine(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """MMEngine exchanges the two sets before it saves: what is called ``ema_state_dict`` holds the raw weights."""
    if not all(key in content for key in ("state_dict", "ema_state_dict")):
        return None
    aside = content["ema_state_dict"]
    average = stored(content["state_dict"], "in `state_dict`", _int(aside.get("steps")))
    raw = stored(_stripped(aside, DDP), "in `ema_state_dict`")
    sets = {"average": average, "raw": stored({**average.state_dict, **raw.state_dict}, raw.where, of_lightning=True)}
    return file_of(path, "a checkpoint of MMEngine's EMAHook", sets, content)


def _timm(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not all(key in content for key in ("state_dict", "state_dict_ema")):
        return None
    sets = {
        "average": stored(content["state_dict_ema"], "in `state_dict_ema`"),
        "raw": stored(content["state_dict"], "in `state_dict`"),
    }
    return file_of(path, "a checkpoint of timm", sets, content)


def _ema_pytorch(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    for where, state in {"the whole file": content, **{f"in `{key}`": value for key, value in content.items()}}.items():
        if not isinstance(state, Mapping):
            continue
        state = _stripped(state, DDP) if all(str(name).startswith(DDP) for name in state) else state
        if average := _stripped(state, "ema_model."):
            sets = {"average": stored(average, where, _int(state.get("step")))}
            if raw := _stripped(state, "online_model."):
                sets["raw"] = stored(raw, where)
            return file_of(path, "a state of ema-pytorch", sets, content)
    return None


def _torch_averaged_model(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if "n_averaged" not in content or not (average := _stripped(content, DDP)):
        return None
    updates = _int(content["n_averaged"])
    return file_of(path, "a state of torch's AveragedModel", {"average": stored(average, "here", updates)}, content)


def _nemo_pair(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """NeMo writes raw weights to ``x.ckpt`` and the average to ``x-EMA.ckpt``."""
    if not isinstance(path, Path):  # a URL
        return None
    is_average = path.stem.endswith("-EMA")
    twin = path.with_stem(path.stem.removesuffix("-EMA") if is_average else f"{path.stem}-EMA")
    if not isinstance(content.get("state_dict"), Mapping) or not (is_average or twin.is_file()):
        return None
    here, there = ("average", "raw") if is_average else ("raw", "average")
    sets = {here: stored(content["state_dict"], "in `state_dict`", of_lightning=True)}
    if twin.is_file():
        where = f"in `state_dict` of {twin.name}"
        other = read(twin, "cpu" if holds_numbers(content["state_dict"]) else "meta")
        sets[there] = replace(stored(other["state_dict"], where, of_lightning=True), file=twin)
    return file_of(path, "one of a pair of files as NeMo's EMA writes them", sets, content)


def _one_state_dict(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not isinstance(content.get("state_dict"), Mapping):
        return None
    is_theirs = "pytorch-lightning_version" in content
    sets = {"weights": stored(content["state_dict"], "in `state_dict`", of_lightning=is_theirs)}
    return file_of(path, "a plain Lightning checkpoint" if is_theirs else "a checkpoint", sets, content)


def _flat(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not _is_state_dict(content):
        return None
    return file_of(path, "a state dict", {"weights": stored(content, "the whole file")}, content)


def _nested(content: Mapping[str, Any], path: Location) -> WeightFile | None:
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
        if "n_averaged" in value and (average := _stripped(value, DDP)):
            found[str(key)] = stored(average, where, _int(value["n_averaged"]))
        elif _is_state_dict(value):
            found[str(key)] = stored(value, where)
    return found


def _is_of_optimizer(key: str) -> bool:
    return any(word in key.lower() for word in ("optim", "scheduler", "scaler"))


def _beside_others(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """A state dict with other entries among its tensors."""
    found = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    if not any(tensor.is_floating_point() for tensor in found.values()) or any(map(_is_holder, content.values())):
        return None
    return file_of(path, "a state dict beside other entries", {"weights": stored(found, "among them")}, content)


def _is_holder(value: Any) -> bool:
    return isinstance(value, (Mapping, list, tuple)) and len(value) > 0


LAYOUTS: tuple[Callable[[Mapping[str, Any], Location], WeightFile | None], ...] = (
    ours,
    _lightning_weight_averaging,
    _lightning_stochastic_averaging,
    _mmengine,
    _timm,
    _ema_pytorch,
    _torch_averaged_model,
    _nemo_pair,
    _one_state_dict,
    _flat,
    _nested,
    _beside_others,
)


def _is_state_dict(value: Any) -> bool:
    """Whether it is tensors by name, and perhaps what modules keep beside them."""
    if not isinstance(value, Mapping):
        return False
    named = {str(name): item for name, item in value.items() if not is_extra(str(name))}
    return bool(named) and all(isinstance(item, Tensor) for item in named.values()) and _has_names(value)


def _has_names(value: Mapping[Any, Any]) -> bool:
    """Whether keys are texts, and more than bytes of a generator's state stands there."""
    return all(isinstance(name, str) for name in value) and any(t.dtype != torch.uint8 for t in tensors(value).values())


def _stripped(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {str(name).removeprefix(prefix): item for name, item in state.items() if str(name).startswith(prefix)}
    return found if tensors(found) else {}


def _int(value: Any) -> int | None:
    unknown = value is None or not holds_numbers({"": value})
    return None if unknown else int(value)
