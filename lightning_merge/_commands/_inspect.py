"""``lightning-merge inspect``: what is in a checkpoint file, in words."""

import os
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_merge._commands._target import literal
from lightning_merge.files._check import opened
from lightning_merge.files._folders import AVERAGE, Config, class_of, config_of, is_index
from lightning_merge.files._label import Label
from lightning_merge.files._layouts import open_file, sets_of
from lightning_merge.files._other_formats import is_safetensors
from lightning_merge.files._read import Location, is_plain, read
from lightning_merge.files._sets import StoredSet, sources_of, stored
from lightning_merge.files._sharded import is_sharded_checkpoint
from lightning_merge.files._stand_ins import StandIn, stands_for
from lightning_merge.files._write import is_remote


def describe(path: str | os.PathLike[str]) -> str:
    """Which weight sets a file holds, how often each was updated, which one its score belongs to, how to load it.

    Raises:
        ValueError: If the file cannot be read.
        OSError: If the system refuses to read it.
    """
    is_read_later = is_safetensors(path) or _is_gathered(path)  # by `open_file`
    content = {} if is_read_later else read(path, _location(path), check=False)
    return "\n".join([f"{path} ({_bytes(path) / 2**20:.1f} MiB)", *_describe(content, path)])


def _location(path: str | os.PathLike[str]) -> Location:
    """Of a folder no numbers are read; those of a file stay on disk by themselves."""
    return "meta" if not is_remote(path) and is_sharded_checkpoint(Path(path)) else "cpu"


def _is_gathered(path: str | os.PathLike[str]) -> bool:
    """Whether it is a folder or an index, of which other files are read."""
    return is_index(path) or (not is_remote(path) and Path(path).is_dir() and not is_sharded_checkpoint(Path(path)))


def _bytes(path: str | os.PathLike[str]) -> int:
    if not is_remote(path) and Path(path).is_dir():
        return sum(file.stat().st_size for file in Path(path).iterdir())
    with opened(path) as file:
        return file.seek(0, 2)


def _describe(content: Any, path: str | os.PathLike[str]) -> Iterator[str]:
    label = Label.of(content, path)
    if label is None:
        yield from _foreign(content, path)
    else:
        yield from _ours(content, label, path)
    yield from _stand_ins(content)


def _stand_ins(content: Any) -> Iterator[str]:
    found = [(str(key), name) for key, value in _items(content) if (name := stands_for(value)) is not None]
    if found:
        shown = ", ".join(f"`{key}` ({name})" for key, name in found[:4])
        yield f"  not read, since it is no plain data: {shown}{' ...' if len(found) > 4 else ''}"


def _items(content: Any) -> Iterator[tuple[Any, Any]]:
    """Entries of a file, those of its dicts of hyperparameters one by one."""
    for key, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, Mapping) and "hyper_parameters" in str(key) and not isinstance(value, StandIn):
            yield from ((f"{key}.{inner}", item) for inner, item in value.items())
        else:
            yield key, value


def _foreign(content: Any, path: str | os.PathLike[str]) -> Iterator[str]:
    if not isinstance(content, Mapping):
        yield f"  a {type(content).__name__}, not a checkpoint; written without lightning-merge"
        return
    try:
        file = sets_of(content, path) if _location(path) == "meta" else open_file(path, check=False)
    except ValueError as error:
        if not content or "convert it once" in str(error):
            raise
        yield "  written without lightning-merge, and no checkpoint this command knows"
        yield f"  keys: {_some([str(key) for key in content]) or 'none'}"
        return
    yield f"  {file.kind}, {_by_whom(content)}{_progress(content)}"
    yield from _table([(name, f"{found.where}: {_size(found.weights)}") for name, found in file.sets.items()])
    if len(file.sets) > 1:
        for name, found in file.sets.items():
            if name != "raw":
                yield f"  updates of {name}: {'not recorded' if found.updates is None else found.updates}"
        yield "  score: the file does not say which weights its score was measured on"
    if is_safetensors(path) or _is_gathered(path):
        yield from _beside(path)
        yield from _how_to_load(path, file.sets[file.default], "safetensors.torch.load_file({path})")
        return
    yield f"  keys: {_some([str(key) for key in content])}"
    if isinstance(content.get("state_dict"), Mapping):
        in_place = next((name for name, found in file.sets.items() if found.where == "in `state_dict`"), file.default)
        yield from _how_to_load(path, file.sets[in_place], _STATE_DICT, None if in_place == file.default else in_place)
    elif file.sets[file.default].where == "the whole file":
        yield from _how_to_load(path, file.sets[file.default], "torch.load({path}, weights_only=True)")
    if len(file.sets) > 1 or not isinstance(content.get("state_dict"), Mapping):
        command = f"lightning-merge export {shlex.quote(os.fspath(path))} weights.safetensors"
        yield f"  one set alone: {command} --set {shlex.quote(file.default)}"


def _ours(content: Mapping[str, Any], label: Label, path: str | os.PathLike[str]) -> Iterator[str]:
    if not isinstance(content.get("state_dict"), Mapping):
        open_file(path, check=False)  # says what is wrong with it
    full = label.raw is not None
    yield f"  a {'full' if full else 'weights-only'} checkpoint with the label of lightning-merge{_progress(content)}"

    holds = label.holds
    rows = []
    for name, average in label.averages.items():
        where = "in `state_dict`" if name == holds else "state, to go on with" if full else "not in this file"
        rows.append((name, f"{_average(average)}; {where}"))
    rows.append(("raw", "in `state_dict`" if holds == "raw" else "to go on with" if full else "not in this file"))
    yield from _table(rows)

    yield f"  `state_dict` holds: {holds}, {_size(content['state_dict'])}"
    if label.monitor is not None and label.score is not None:
        yield f"  score: {label.monitor} = {label.score:.6g}, measured on {holds}"
    if label.metrics:
        yield f"  metrics of {holds}: " + ", ".join(f"{name} = {value:.6g}" for name, value in label.metrics.items())
    if not label.measured:
        yield f"  not measured: no validation ran on {holds} at this step"
    held = stored(content["state_dict"], "in `state_dict`", of_lightning=True)
    yield from _how_to_load(path, held, _STATE_DICT)
    if full:
        yield f"  go on training: trainer.fit(model, ckpt_path={literal(path)}), with the same callbacks"
    else:
        yield "  training cannot go on from it: the raw weights are not in this file"


def _average(average: Mapping[str, Any]) -> str:
    rule = re.sub(r", \w+=(None|False)", "", average.get("rule", "rule not said"))  # options that are off
    text = f"{average.get('class')}, {rule}, {average.get('updates')} updates in {average.get('steps')} steps"
    if "accepted" in average:
        text += f", of which {average['accepted']:.0%} of the way from raw was accepted"
    return text


def _beside(path: str | os.PathLike[str]) -> Iterator[str]:
    """What ``MergeCallback`` has put into a checkpoint folder of transformers."""
    kept = Path(path) / AVERAGE
    if is_remote(path) or not kept.is_file():
        return
    content: Any = read(kept, check=False)
    average = content.get("average") if isinstance(content, Mapping) else None
    if average is None:
        yield "  holds merged weights alone: training cannot go on from it"
        return
    updates = (average.get("state") or {}).get("updates", 0)
    said = f"{average.get('rule')}, {updates} updates in {average.get('steps')} steps"
    held = "merged weights" if content.get("raw") else "raw weights, since nothing was merged"
    yield f"  holds {held}; {kept.name} has the raw ones and the average to go on with: {said}"


def _config(path: str | os.PathLike[str]) -> Config | None:
    """The settings of a folder that ``save_pretrained`` wrote."""
    if is_remote(path) or not Path(path).is_dir():
        return None
    try:
        return config_of(path)
    except ValueError:
        return None


_STATE_DICT = 'torch.load({path}, weights_only=True)["state_dict"]'


def _how_to_load(
    path: str | os.PathLike[str], found: StoredSet, plainly: str, name: str | None = None
) -> Iterator[str]:
    """The line that loads a set; one that needs no lightning-merge where that has been tried and does it."""
    if (config := _config(path)) is not None:
        yield f"  load: {class_of(config, literal(path))}"
        return
    if is_index(path) or (not is_remote(path) and Path(path).is_dir()):
        command = f"lightning-merge export {shlex.quote(os.fspath(path))} weights.pt"
        what = "several files" if _is_gathered(path) else "a sharded checkpoint"
        yield f"  {what}; to load it in one process: {command}"
        return
    end = ", strict=False)" if found.left_out else ")"
    # A module of Lightning's has the names that its own file has, also where parts of it are compiled.
    names_fit = not found.stripped and (found.of_lightning or not found.keys)
    if names_fit and not found.left_out and is_plain(path):
        yield f"  load: model.load_state_dict({plainly.format(path=literal(path))}{end}"
        return
    chosen = "" if name is None else f", {literal(name)}"
    read_line = f"model.load_state_dict(read_weights({literal(path)}{chosen}){end}"
    yield f"  load: from lightning_merge.compat import read_weights; {read_line}"


def _by_whom(content: Mapping[str, Any]) -> str:
    if files := sources_of(content):
        about = content["provenance"]
        which = f", {weights} weights" if (weights := about.get("weights")) else ""
        return f"written by lightning-merge: {about['rule']} of {len(files)} checkpoints{which}"
    return "written without lightning-merge"


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
