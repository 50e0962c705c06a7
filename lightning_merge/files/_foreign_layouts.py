"""Layouts of files that other libraries write, each recognised by its keys."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_merge.files._generic_layouts import (
    Location,
    beside_others,
    count,
    file_of,
    flat,
    nested,
    one_state_dict,
    stripped,
)
from lightning_merge.files._ours import ours
from lightning_merge.files._read import read
from lightning_merge.files._sets import DDP, WeightFile, holds_numbers, stored


def of_lightning(content: Mapping[str, Any]) -> WeightFile | None:
    """The sets of a checkpoint of one of Lightning's averaging callbacks, if it is one."""
    path = "the checkpoint"
    return _lightning_weight_averaging(content, path) or _lightning_stochastic_averaging(content, path)


def _lightning_weight_averaging(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not all(key in content for key in ("state_dict", "current_model_state", "averaging_state")):
        return None
    updates = count(content["averaging_state"].get("n_averaged"))
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
                updates = count(state["n_averaged"])
                sets["average"] = stored(state["average_model_state"], where, updates, of_lightning=True)
            return file_of(path, "a checkpoint of Lightning's StochasticWeightAveraging callback", sets, content)
    return None


def _mmengine(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """MMEngine exchanges the two sets before it saves: what is called ``ema_state_dict`` holds the raw weights."""
    if not all(key in content for key in ("state_dict", "ema_state_dict")):
        return None
    aside = content["ema_state_dict"]
    average = stored(content["state_dict"], "in `state_dict`", count(aside.get("steps")))
    raw = stored(stripped(aside, DDP), "in `ema_state_dict`")
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
        state = stripped(state, DDP) if all(str(name).startswith(DDP) for name in state) else state
        if average := stripped(state, "ema_model."):
            sets = {"average": stored(average, where, count(state.get("step")))}
            if raw := stripped(state, "online_model."):
                sets["raw"] = stored(raw, where)
            return file_of(path, "a state of ema-pytorch", sets, content)
    return None


def _torch_averaged_model(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if "n_averaged" not in content or not (average := stripped(content, DDP)):
        return None
    updates = count(content["n_averaged"])
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


LAYOUTS: tuple[Callable[[Mapping[str, Any], Location], WeightFile | None], ...] = (
    ours,
    _lightning_weight_averaging,
    _lightning_stochastic_averaging,
    _mmengine,
    _timm,
    _ema_pytorch,
    _torch_averaged_model,
    _nemo_pair,
    one_state_dict,
    flat,
    nested,
    beside_others,
)
