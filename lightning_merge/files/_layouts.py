"""The sets of weights that a checkpoint holds, whichever library wrote it, under the names of a plain module."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from lightning_merge.files._ours import ours
from lightning_merge.files._read import read
from lightning_merge.files._safetensors import read_safetensors
from lightning_merge.files._sets import DDP, StoredSet, WeightFile, holds_numbers, is_extra, stored, tensors
from lightning_merge.files._write import is_remote

Location: TypeAlias = str | os.PathLike[str]


def open_file(path: Location, check: bool = True) -> WeightFile:
    """The sets of a file of lightning-merge, Lightning, timm, ema-pytorch, NeMo, MMEngine, torch or safetensors.

    Args:
        path: A file, the folder of a sharded checkpoint, or a URL.
        check: As for ``read``.

    Raises:
        ValueError: If the file cannot be read or holds no weights.
        OSError: If the system refuses to read it.
    """
    if not is_remote(path):
        path = Path(path)
    if os.fspath(path).endswith(".safetensors"):
        sets = {"weights": stored(read_safetensors(path), "the whole file")}
        return _file(path, "a safetensors file", sets, None)
    return sets_of(read(path, check=check), path)


def sets_of(content: Any, path: Location) -> WeightFile:
    """The sets in the content of a file.

    Raises:
        ValueError: If it holds no weights, or is laid out like a file of a library and yet is none.
    """
    if isinstance(content, Mapping):
        for recognise in _LAYOUTS:
            try:
                found = recognise(content, path)
            except (KeyError, TypeError, AttributeError, IndexError) as error:
                kind = recognise.__name__.strip("_").replace("_", " ")
                raise ValueError(
                    f"{path} looks like a file of {kind}, and is not as that writes it ({error!r}). It was changed"
                    " after it was written, or is damaged: use another checkpoint."
                ) from error
            if found is not None:
                return found
    raise ValueError(
        f"{path} holds no weights that could be found: no `state_dict`, and no tensors by name."
        f" `lightning-merge inspect {path}` lists what is in it."
    )


def open_set(text: str) -> tuple[WeightFile, str]:
    """A file and one of its sets from ``FILE`` or ``FILE:SET``.

    Raises:
        ValueError: As ``open_file``, or if the file holds no such set.
    """
    name, separator, chosen = text.rpartition(":")
    has_set = separator and not Path(text).exists() and Path(name).exists()
    if is_remote(text):
        has_set = is_remote(name) and "/" not in chosen
    if not has_set:
        file = open_file(text)
        return file, file.default
    file = open_file(name)
    file.choose(chosen)
    return file, chosen


def of_lightning(content: Mapping[str, Any]) -> WeightFile | None:
    """The sets of a checkpoint of one of Lightning's averaging callbacks, if it is one."""
    path = "the checkpoint"
    return _lightning_weight_averaging(content, path) or _lightning_stochastic_averaging(content, path)


def _file(path: Location, kind: str, sets: dict[str, StoredSet], content: Any) -> WeightFile:
    return WeightFile(path, kind, sets, next(iter(sets)), content)


# ---- one function per layout: None if a file does not have it


def _lightning_weight_averaging(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not all(key in content for key in ("state_dict", "current_model_state", "averaging_state")):
        return None
    updates = _int(content["averaging_state"].get("n_averaged"))
    sets = {
        "average": stored(content["state_dict"], "in `state_dict`", updates, of_lightning=True),
        "raw": stored(content["current_model_state"], "in `current_model_state`", of_lightning=True),
    }
    return _file(path, "a checkpoint of Lightning's WeightAveraging callback", sets, content)


def _lightning_stochastic_averaging(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    for key, state in content.get("callbacks", {}).items():
        if key.partition("{")[0] == "StochasticWeightAveraging" and "average_model_state" in state:
            sets = {"raw": stored(content["state_dict"], "in `state_dict`", of_lightning=True)}
            if state["n_averaged"] and state["average_model_state"] is not None:
                where = f"in `callbacks`, `{key}`"
                updates = _int(state["n_averaged"])
                sets["average"] = stored(state["average_model_state"], where, updates, of_lightning=True)
            return _file(path, "a checkpoint of Lightning's StochasticWeightAveraging callback", sets, content)
    return None


def _mmengine(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """MMEngine exchanges the two sets before it saves: what is called ``ema_state_dict`` holds the raw weights."""
    if not all(key in content for key in ("state_dict", "ema_state_dict")):
        return None
    aside = content["ema_state_dict"]
    average = stored(content["state_dict"], "in `state_dict`", _int(aside.get("steps")))
    raw = stored(_stripped(aside, DDP), "in `ema_state_dict`")
    sets = {"average": average, "raw": stored({**average.state_dict, **raw.state_dict}, raw.where, of_lightning=True)}
    return _file(path, "a checkpoint of MMEngine's EMAHook", sets, content)


def _timm(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not all(key in content for key in ("state_dict", "state_dict_ema")):
        return None
    sets = {
        "average": stored(content["state_dict_ema"], "in `state_dict_ema`"),
        "raw": stored(content["state_dict"], "in `state_dict`"),
    }
    return _file(path, "a checkpoint of timm", sets, content)


def _ema_pytorch(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    for where, state in {"the whole file": content, **{f"in `{key}`": value for key, value in content.items()}}.items():
        if not isinstance(state, Mapping):
            continue
        state = _stripped(state, DDP) if all(str(name).startswith(DDP) for name in state) else state
        if average := _stripped(state, "ema_model."):
            sets = {"average": stored(average, where, _int(state.get("step")))}
            if raw := _stripped(state, "online_model."):
                sets["raw"] = stored(raw, where)
            return _file(path, "a state of ema-pytorch", sets, content)
    return None


def _torch_averaged_model(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if "n_averaged" not in content or not (average := _stripped(content, DDP)):
        return None
    updates = _int(content["n_averaged"])
    return _file(path, "a state of torch's AveragedModel", {"average": stored(average, "here", updates)}, content)


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
    return _file(path, "one of a pair of files as NeMo's EMA writes them", sets, content)


def _one_state_dict(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not isinstance(content.get("state_dict"), Mapping):
        return None
    is_theirs = "pytorch-lightning_version" in content
    sets = {"weights": stored(content["state_dict"], "in `state_dict`", of_lightning=is_theirs)}
    return _file(path, "a plain Lightning checkpoint" if is_theirs else "a checkpoint", sets, content)


def _flat(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    if not _is_state_dict(content):
        return None
    return _file(path, "a state dict", {"weights": stored(content, "the whole file")}, content)


def _nested(content: Mapping[str, Any], path: Location) -> WeightFile | None:
    """Any other dict of state dicts, as ``{"model": ..., "model_ema": ...}``."""
    found = {str(key): stored(value, f"in `{key}`") for key, value in content.items() if _is_state_dict(value)}
    return _file(path, "a dict of state dicts", found, content) if found else None


_LAYOUTS: tuple[Callable[[Mapping[str, Any], Location], WeightFile | None], ...] = (
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
)


def _is_state_dict(value: Any) -> bool:
    """Whether it is tensors by name, and perhaps what modules keep beside them."""
    if not isinstance(value, Mapping):
        return False
    named = {str(name): item for name, item in value.items() if not is_extra(str(name))}
    return bool(named) and all(isinstance(item, Tensor) for item in named.values())


def _stripped(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    found = {str(name).removeprefix(prefix): item for name, item in state.items() if str(name).startswith(prefix)}
    return found if tensors(found) else {}


def _int(value: Any) -> int | None:
    unknown = value is None or not holds_numbers({"": value})
    return None if unknown else int(value)
