"""What is in a checkpoint file, in words."""

import pickle
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# What Lightning's own WeightAveraging adds to a checkpoint.
_LIGHTNING_AVERAGING = ("current_model_state", "averaging_state")


def read(path: Path) -> Any:
    """The content of a file that torch wrote, on the CPU; tensors stay on disk until they are used.

    Raises:
        ValueError: If there is no such file, or it is cut short, not torch's, or holds more than plain data.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: a sharded checkpoint, or the wrong path. Name a file.")
    if not path.is_file():
        near = sorted(path.parent.glob("*.ckpt")) if path.parent.is_dir() else []
        cure = f" In {path.parent} there are: {', '.join(file.name for file in near)}." if near else ""
        raise ValueError(f"there is no file {path}.{cure}")
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            return torch.load(path, map_location="cpu", weights_only=True)  # torch's format before 1.6
    except pickle.UnpicklingError as error:
        if "Unsupported global" not in str(error) and "GLOBAL" not in str(error):
            raise ValueError(_unreadable(path)) from error
        raise ValueError(
            f"{path} holds Python objects besides tensors and plain data, so reading it would run code. If you trust"
            " it, load it with `torch.load(..., weights_only=False)` and save its state_dict."
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise ValueError(_unreadable(path)) from error


def describe(path: Path) -> str:
    """Which weight sets a file holds, how often each was updated, which one its score belongs to, how to load it.

    Raises:
        ValueError: If the file cannot be read.
    """
    content = read(path)
    return "\n".join([f"{path} ({path.stat().st_size / 2**20:.1f} MiB)", *_describe(content, path)])


def _describe(content: Any, path: Path) -> Iterator[str]:
    if not isinstance(content, Mapping):
        yield f"  a {type(content).__name__}, not a checkpoint; written without lightning-merge"
    elif "lightning_merge" in content:
        yield from _ours(content, content["lightning_merge"], path)
    elif all(key in content for key in _LIGHTNING_AVERAGING):
        yield "  a checkpoint of Lightning's WeightAveraging callback, written without lightning-merge" + _progress(
            content
        )
        yield from _table(
            [
                ("average", f"in `state_dict`: {_size(content['state_dict'])}"),
                ("raw", f"in `current_model_state`: {_size(content['current_model_state'])}"),
            ]
        )
        updates = content["averaging_state"].get("n_averaged")
        yield f"  updates of the average: {'not recorded' if updates is None else int(updates)}"
        yield "  score: the file does not say which weights its score was measured on"
        yield from _how_to_load(path)
    elif isinstance(content.get("state_dict"), Mapping):
        kind = "plain Lightning checkpoint" if "pytorch-lightning_version" in content else "checkpoint"
        yield f"  a {kind}, written without lightning-merge{_progress(content)}"
        yield from _table([("weights", f"in `state_dict`: {_size(content['state_dict'])}")])
        yield f"  keys: {', '.join(map(str, content))}"
        yield from _how_to_load(path)
    elif content and all(isinstance(value, Tensor) for value in content.values()):
        yield "  a state dict, written without lightning-merge"
        yield from _table([("weights", _size(content))])
        yield f"  keys: {_some(list(content))}"
        yield f'  load: model.load_state_dict(torch.load("{path}", weights_only=True))'
    else:
        yield "  written without lightning-merge, and no checkpoint this command knows"
        yield f"  keys: {_some([str(key) for key in content]) or 'none'}"


def _ours(content: Mapping[str, Any], label: Mapping[str, Any], path: Path) -> Iterator[str]:
    if label.get("format") != 1:
        raise ValueError(
            f"{path} has format {label.get('format')} of lightning-merge; this version reads 1. Update it."
        )
    full = "raw" in label
    yield f"  a {'full' if full else 'weights-only'} checkpoint with the label of lightning-merge{_progress(content)}"

    holds = label["holds"]
    rows = []
    for name, average in label["averages"].items():
        where = "in `state_dict`" if name == holds else "state, to go on with" if full else "not in this file"
        rows.append((name, f"{_average(average)}; {where}"))
    rows.append(("raw", "in `state_dict`" if holds == "raw" else "to go on with" if full else "not in this file"))
    yield from _table(rows)

    yield f"  `state_dict` holds: {holds}, {_size(content['state_dict'])}"
    if label["monitor"] is not None and label["score"] is not None:
        yield f"  score: {label['monitor']} = {label['score']:.6g}, measured on {holds}"
    if label["metrics"]:
        yield f"  metrics of {holds}: " + ", ".join(f"{name} = {value:.6g}" for name, value in label["metrics"].items())
    if not label["measured"]:
        yield f"  not measured: no validation ran on {holds} at this step"
    yield from _how_to_load(path)
    if full:
        yield f'  go on training: trainer.fit(model, ckpt_path="{path}"), with the same callbacks'
    else:
        yield "  training cannot go on from it: the raw weights are not in this file"


def _average(average: Mapping[str, Any]) -> str:
    rule = re.sub(r", \w+=(None|False)", "", average["rule"])  # options that are off
    return f"{average['class']}, {rule}, {average['updates']} updates in {average['steps']} steps"


def _how_to_load(path: Path) -> Iterator[str]:
    yield f'  load: model.load_state_dict(torch.load("{path}", weights_only=True)["state_dict"])'


def _progress(content: Mapping[str, Any]) -> str:
    parts = [f"{word} {content[key]}" for word, key in (("epoch", "epoch"), ("step", "global_step")) if key in content]
    return f"; {', '.join(parts)}" if parts else ""


def _size(weights: Mapping[str, Any]) -> str:
    tensors = [value for value in weights.values() if isinstance(value, Tensor)]
    return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors):,} numbers"


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f", ... ({len(names)} in all)" if len(names) > most else "")


def _table(rows: list[tuple[str, str]]) -> Iterator[str]:
    width = max(len(name) for name, _ in rows)
    yield "  weight sets:"
    for name, text in rows:
        yield f"    {name:{width}}  {text}"


def _unreadable(path: Path) -> str:
    return (
        f"{path} cannot be read: it was cut short (an interrupted save or copy), or torch did not write it."
        " Use an earlier checkpoint of the run."
    )
