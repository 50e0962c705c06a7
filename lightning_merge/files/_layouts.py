"""The sets of weights that a checkpoint holds, whichever library wrote it, under the names of a plain module."""

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge import rules, schedules
from lightning_merge.files._read import read
from lightning_merge.rules import Rule
from lightning_merge.weights import Weights, canonical

FORMAT = 1
"""The version of the label that files of lightning-merge carry."""


@dataclass(frozen=True)
class StoredSet:
    """One set of weights in a file.

    Args:
        weights: Tensors under the names that a plain module's ``load_state_dict`` takes.
        where: Where in the file it is, in words.
        updates: How many weights were merged into it, where that is known.
        initial_share: Share of it that is still the weights of the start, where that is known.
    """

    weights: Weights
    where: str
    updates: int | None = None
    initial_share: float | None = None


@dataclass(frozen=True)
class WeightFile:
    """What a file holds.

    Args:
        path: The file.
        kind: What wrote it, in words.
        sets: By name: ``raw``, ``average``, the name of an average, or ``weights`` where there is only one.
        default: The set that the file's score was measured on, as far as that is known.
        content: All of the file.
    """

    path: Path
    kind: str
    sets: dict[str, StoredSet]
    default: str
    content: Any = field(repr=False)

    def choose(self, name: str | None = None) -> StoredSet:
        """The set of this name, or the default one.

        Raises:
            ValueError: If there is none of this name.
        """
        chosen = self.default if name is None else name
        if chosen not in self.sets:
            raise ValueError(
                f"{self.path} holds no set called {chosen!r}. It is {self.kind} and holds: {', '.join(self.sets)}."
            )
        return self.sets[chosen]


def open_file(path: str | Path) -> WeightFile:
    """The sets of a file of lightning-merge, Lightning, timm, ema-pytorch, NeMo, MMEngine, torch or safetensors.

    Raises:
        ValueError: If the file cannot be read or holds no weights.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return _file(path, "a safetensors file", {"weights": StoredSet(_safetensors(path), "the whole file")}, None)
    content = read(path)
    if isinstance(content, Mapping):
        for recognise in _LAYOUTS:
            if (found := recognise(content, path)) is not None:
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
    if not separator or Path(text).exists() or not Path(name).exists():
        file = open_file(text)
        return file, file.default
    file = open_file(name)
    file.choose(chosen)
    return file, chosen


def of_lightning(content: Mapping[str, Any]) -> WeightFile | None:
    """The sets of a checkpoint of one of Lightning's averaging callbacks, if it is one."""
    path = Path("the checkpoint")
    return _lightning_weight_averaging(content, path) or _lightning_stochastic_averaging(content, path)


def _file(path: Path, kind: str, sets: dict[str, StoredSet], content: Any, default: str | None = None) -> WeightFile:
    return WeightFile(path, kind, sets, default or next(iter(sets)), content)


# ---- one function per layout: None if a file does not have it


def _ours(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    if "lightning_merge" not in content:
        return None
    label = content["lightning_merge"]
    if label.get("format") != FORMAT:
        raise ValueError(
            f"{path} has format {label.get('format')} of lightning-merge; this version reads {FORMAT}. Update it."
        )
    saved, holds = _tensors(content["state_dict"]), label["holds"]
    raw = _overlay(saved, label["raw"]) if "raw" in label else None
    averages = {}
    for name, about in label["averages"].items():
        state = label.get("states", {}).get(name)
        averages[name] = None if state is None or raw is None else _average(about, state, raw)
    sets = {holds: StoredSet(saved, "in `state_dict`")}
    if holds in averages:
        held = averages[holds]
        share = None if held is None else held.initial_share
        sets[holds] = StoredSet(saved, "in `state_dict`", label["averages"][holds]["updates"], share)
    if raw is not None:
        sets.setdefault("raw", StoredSet(raw, "beside it, to go on with"))
    for name, average in averages.items():
        if average is not None:
            sets.setdefault(name, average)
    kind = "a full checkpoint of lightning-merge" if raw is not None else "a weights-only checkpoint of lightning-merge"
    return _file(path, kind, sets, content)


def _average(about: Mapping[str, Any], saved: Mapping[str, Any], raw: Weights) -> StoredSet | None:
    """An average out of the state that it goes on with, if the label says which rule of ours reads it."""
    rule = _rule(about.get("rule", ""))
    if rule is None or saved.get("state") is None:
        return None
    state = rule.load(saved["state"], {})
    merged = rule.result(state)
    if merged is None:
        return None
    weights = _overlay(raw, {**merged, **saved["buffers"]})
    return StoredSet(weights, "as a state to go on with", about["updates"], rule.initial_share(state))


def _rule(text: str) -> Rule | None:
    """The rule that printed itself like this; nothing but constructors of ours with plain arguments is called."""

    def build(node: ast.AST) -> Any:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.args:
            cls = getattr(rules, node.func.id, None) or getattr(schedules, node.func.id, None)
            if isinstance(cls, type):
                return cls(**{str(keyword.arg): build(keyword.value) for keyword in node.keywords})
        return ast.literal_eval(node)

    try:
        rule = build(ast.parse(text, mode="eval").body)
    except (ValueError, TypeError, SyntaxError):
        return None
    return rule if isinstance(rule, Rule) else None


def _lightning_weight_averaging(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    if not all(key in content for key in ("state_dict", "current_model_state", "averaging_state")):
        return None
    updates = _int(content["averaging_state"].get("n_averaged"))
    sets = {
        "average": StoredSet(_tensors(content["state_dict"]), "in `state_dict`", updates),
        "raw": StoredSet(_tensors(content["current_model_state"]), "in `current_model_state`"),
    }
    return _file(path, "a checkpoint of Lightning's WeightAveraging callback", sets, content)


def _lightning_stochastic_averaging(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    for key, state in content.get("callbacks", {}).items():
        if key.partition("{")[0] == "StochasticWeightAveraging" and "average_model_state" in state:
            sets = {"raw": StoredSet(_tensors(content["state_dict"]), "in `state_dict`")}
            if state["n_averaged"] and state["average_model_state"] is not None:
                where = f"in `callbacks`, `{key}`"
                sets["average"] = StoredSet(_tensors(state["average_model_state"]), where, int(state["n_averaged"]))
            return _file(path, "a checkpoint of Lightning's StochasticWeightAveraging callback", sets, content)
    return None


def _mmengine(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    """MMEngine exchanges the two sets before it saves: what is called ``ema_state_dict`` holds the raw weights."""
    if not all(key in content for key in ("state_dict", "ema_state_dict")):
        return None
    average, aside = _tensors(content["state_dict"]), content["ema_state_dict"]
    sets = {
        "average": StoredSet(average, "in `state_dict`", _int(aside.get("steps"))),
        "raw": StoredSet(average | _stripped(aside, "module."), "in `ema_state_dict`"),
    }
    return _file(path, "a checkpoint of MMEngine's EMAHook", sets, content)


def _timm(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    if not all(key in content for key in ("state_dict", "state_dict_ema")):
        return None
    sets = {
        "average": StoredSet(_tensors(content["state_dict_ema"]), "in `state_dict_ema`"),
        "raw": StoredSet(_tensors(content["state_dict"]), "in `state_dict`"),
    }
    return _file(path, "a checkpoint of timm", sets, content)


def _ema_pytorch(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    for where, state in {"the whole file": content, **{f"in `{key}`": value for key, value in content.items()}}.items():
        if isinstance(state, Mapping) and (average := _stripped(state, "ema_model.")):
            sets = {"average": StoredSet(average, where, _int(state.get("step")))}
            if raw := _stripped(state, "online_model."):
                sets["raw"] = StoredSet(raw, where)
            return _file(path, "a state of ema-pytorch", sets, content)
    return None


def _torch_averaged_model(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    if "n_averaged" not in content or not (average := _stripped(content, "module.")):
        return None
    updates = _int(content["n_averaged"])
    return _file(path, "a state of torch's AveragedModel", {"average": StoredSet(average, "here", updates)}, content)


def _nemo_pair(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    """NeMo writes raw weights to ``x.ckpt`` and the average to ``x-EMA.ckpt``."""
    is_average = path.stem.endswith("-EMA")
    twin = path.with_stem(path.stem.removesuffix("-EMA") if is_average else f"{path.stem}-EMA")
    if not isinstance(content.get("state_dict"), Mapping) or not (is_average or twin.is_file()):
        return None
    here, there = ("average", "raw") if is_average else ("raw", "average")
    sets = {here: StoredSet(_tensors(content["state_dict"]), "in `state_dict`")}
    if twin.is_file():
        sets[there] = StoredSet(_tensors(read(twin)["state_dict"]), f"in `state_dict` of {twin.name}")
    return _file(path, "one of a pair of files as NeMo's EMA writes them", sets, content)


def _one_state_dict(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    if not isinstance(content.get("state_dict"), Mapping):
        return None
    kind = "a plain Lightning checkpoint" if "pytorch-lightning_version" in content else "a checkpoint"
    return _file(path, kind, {"weights": StoredSet(_tensors(content["state_dict"]), "in `state_dict`")}, content)


def _flat(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    if not content or not all(isinstance(value, Tensor) for value in content.values()):
        return None
    return _file(path, "a state dict", {"weights": StoredSet(dict(content), "the whole file")}, content)


def _nested(content: Mapping[str, Any], path: Path) -> WeightFile | None:
    """Any other dict of state dicts, as ``{"model": ..., "model_ema": ...}``."""
    found = {
        str(key): StoredSet(dict(value), f"in `{key}`")
        for key, value in content.items()
        if isinstance(value, Mapping) and value and all(isinstance(item, Tensor) for item in value.values())
    }
    return _file(path, "a dict of state dicts", found, content) if found else None


_LAYOUTS: tuple[Callable[[Mapping[str, Any], Path], WeightFile | None], ...] = (
    _ours,
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


# ---- names and tensors


def _tensors(state: Mapping[str, Any]) -> Weights:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _stripped(state: Mapping[str, Any], prefix: str) -> Weights:
    return {name.removeprefix(prefix): t for name, t in _tensors(state).items() if name.startswith(prefix)}


def _int(value: Any) -> int | None:
    return None if value is None else int(value)


def _overlay(saved: Weights, merged: Mapping[str, Tensor]) -> Weights:
    """``saved`` with the tensors of ``merged`` in place, which has canonical names and tied tensors once."""
    return {key: merged[name].to(t.dtype) if name in merged else t for key, name, t in _owners(saved, merged)}


def _owners(saved: Weights, merged: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Every key with the name that ``merged`` has for it: its own, or that of a key which is the same numbers."""
    by_storage = {_storage(t): canonical(key) for key, t in reversed(saved.items()) if canonical(key) in merged}
    for key, tensor in saved.items():
        name = canonical(key)
        yield key, name if name in merged else by_storage.get(_storage(tensor), ""), tensor


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    return (tensor.data_ptr(), tensor.shape, tensor.stride()) if tensor.numel() else (id(tensor),)


def _safetensors(path: Path) -> Weights:
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError('reading it needs safetensors: pip install "lightning-merge[export]"') from error
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read: {error}. It was cut short, or is no safetensors file.") from error


def match(first: WeightFile, left: Weights, second: WeightFile, right: Weights) -> None:
    """Refuses sets of different models.

    Raises:
        ValueError: With the first name or shape that differs.
    """
    for name in [*left, *right]:
        if name not in left or name not in right:
            has, has_not = (first, second) if name in left else (second, first)
            raise ValueError(
                f"{first.path} and {second.path} are of different models: `{name}` is in {has.path} only, not in"
                f" {has_not.path}. `lightning-merge inspect` shows what each holds; `export --strip PREFIX` removes a"
                " prefix of names."
            )
        if left[name].shape != right[name].shape:
            raise ValueError(
                f"{first.path} and {second.path} are of different models: `{name}` has shape"
                f" {tuple(left[name].shape)} in one and {tuple(right[name].shape)} in the other."
            )


def bytes_of(weights: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors take."""
    return sum(t.numel() * t.element_size() for t in weights.values())


def contiguous(weights: Mapping[str, Tensor]) -> Weights:
    """Each tensor in memory of its own, as safetensors wants it."""
    return {name: t.detach().clone(memory_format=torch.contiguous_format) for name, t in weights.items()}
