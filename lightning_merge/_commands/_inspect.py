"""``lightning-merge inspect``: what is in a checkpoint file, in words."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge.files._layouts import open_file
from lightning_merge.files._read import read


def describe(path: Path) -> str:
    """Which weight sets a file holds, how often each was updated, which one its score belongs to, how to load it.

    Raises:
        ValueError: If the file cannot be read.
    """
    content = {} if path.suffix == ".safetensors" else read(path)  # `open_file` reads those
    size = sum(file.stat().st_size for file in (path.iterdir() if path.is_dir() else [path]))
    return "\n".join([f"{path} ({size / 2**20:.1f} MiB)", *_describe(content, path)])


def _describe(content: Any, path: Path) -> Iterator[str]:
    if isinstance(content, Mapping) and "lightning_merge" in content:
        yield from _ours(content, content["lightning_merge"], path)
    else:
        yield from _foreign(content, path)


def _foreign(content: Any, path: Path) -> Iterator[str]:
    if not isinstance(content, Mapping):
        yield f"  a {type(content).__name__}, not a checkpoint; written without lightning-merge"
        return
    try:
        file = open_file(path)
    except ValueError:
        if path.suffix == ".safetensors":
            raise
        yield "  written without lightning-merge, and no checkpoint this command knows"
        yield f"  keys: {_some([str(key) for key in content]) or 'none'}"
        return
    yield f"  {file.kind}, written without lightning-merge{_progress(content)}"
    yield from _table([(name, f"{stored.where}: {_size(stored.weights)}") for name, stored in file.sets.items()])
    if len(file.sets) > 1:
        for name, stored in file.sets.items():
            if name != "raw":
                yield f"  updates of {name}: {'not recorded' if stored.updates is None else stored.updates}"
        yield "  score: the file does not say which weights its score was measured on"
    if path.suffix == ".safetensors":
        yield f'  load: model.load_state_dict(safetensors.torch.load_file("{path}"))'
        return
    yield f"  keys: {_some([str(key) for key in content])}"
    if isinstance(content.get("state_dict"), Mapping):
        yield from _how_to_load(path)
    elif file.sets[file.default].where == "the whole file":
        yield f'  load: model.load_state_dict(torch.load("{path}", weights_only=True))'
    if len(file.sets) > 1 or not isinstance(content.get("state_dict"), Mapping):
        yield f"  one set alone: lightning-merge export {path} weights.safetensors --set {file.default}"


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
    text = f"{average['class']}, {rule}, {average['updates']} updates in {average['steps']} steps"
    if "accepted" in average:
        text += f", of which {average['accepted']:.0%} of the way from raw was accepted"
    return text


def _how_to_load(path: Path) -> Iterator[str]:
    if path.is_dir():
        yield f"  a sharded checkpoint; to load it in one process: lightning-merge export {path} weights.pt"
        return
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
