"""What a merged file keeps of the files it was made of, so that Lightning loads it as it loads those."""

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_merge.files import KEY, read
from lightning_merge.files._folders import is_index
from lightning_merge.files._other_formats import is_safetensors
from lightning_merge.files._stand_ins import stands_for
from lightning_merge.tangent._linearize import KEY as LINEAR

_VERSION = "pytorch-lightning_version"
_HYPER_PARAMETERS = ("hyper_parameters", "datamodule_hyper_parameters")
_OF_TRAINING = {
    *("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "epoch", "global_step", "provenance"),
    *("native_amp_scaling_state", "amp_scaling_state", "MixedPrecision", "current_model_state", "averaging_state"),
    *("ema_state_dict", "state_dict_ema", "message_hub", "model_state", "optimizer", "meta", _VERSION),
}


def kept_of(paths: list[Path]) -> tuple[dict[str, Any], list[str]]:
    """Entries of checkpoints of Lightning that are the same in all, and the names of those that are not or cannot be.

    The version that wrote them, hyperparameters, w0 of linear networks, what the module's ``on_save_checkpoint`` added.
    """
    contents = [read(path / "meta.pt" if path.is_dir() else path, check=False) for path in paths if _is_torchs(path)]
    if len(contents) < len(paths) or not all(isinstance(each, Mapping) and _VERSION in each for each in contents):
        return {}, []
    last, others = contents[-1], contents[:-1]
    kept: dict[str, Any] = {key: last[key] for key in (_VERSION, "epoch", "global_step") if key in last}
    lost: list[str] = []
    for key in dict.fromkeys(str(key) for each in contents for key in each):
        if key in _OF_TRAINING or (
            key.startswith(KEY) and key != LINEAR
        ):  # without w0 its weights are another function
            continue
        if key in _HYPER_PARAMETERS and isinstance(last.get(key), Mapping):
            names = dict.fromkeys(name for each in contents for name in each.get(key) or ())
            found = {name: _shared([each.get(key) or {} for each in contents], name) for name in names}
            kept[key] = {name: value[0] for name, value in found.items() if value}
            lost += [f"{key}.{name}" for name, value in found.items() if not value]
        elif shared := _shared([*others, last], key):
            kept[key] = shared[0]
        else:
            lost.append(key)
    return kept, lost


def _is_torchs(path: Path) -> bool:
    if is_index(path) or is_safetensors(path):
        return False
    return not path.is_dir() or (path / "meta.pt").is_file()


def _shared(contents: list[Mapping[Any, Any]], key: Any) -> list[Any]:
    """The value that all have under a key, if all have it and it can be written."""
    if not all(key in each for each in contents):
        return []
    first = contents[-1][key]
    same = stands_for(first) is None and all(_same(each[key], first) for each in contents[:-1])
    return [first] if same and is_plain(first) else []


def is_plain(value: Any) -> bool:
    """Whether ``torch.load(..., weights_only=True)`` reads it back."""
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except (pickle.PickleError, RuntimeError, TypeError, AttributeError):
        return False
    return True


def _same(a: Any, b: Any) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    return bool(a == b) or (a != a and b != b)
