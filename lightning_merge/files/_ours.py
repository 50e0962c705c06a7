"""The sets in a file of lightning-merge."""

import ast
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_merge import rules, schedules
from lightning_merge.files._label import Label, as_written
from lightning_merge.files._sets import StoredSet, WeightFile, holds_numbers, stored, tensors
from lightning_merge.rules import PowerMeans, Rule
from lightning_merge.weights import Weights, canonical

_ELSEWHERE = (
    "Its state names files in {directory}, a folder that only this file names, so nothing is read there. A run that"
    " goes on from this file with that `directory` has it, and writes it to its own `-final.ckpt`."
)


def ours(content: Mapping[str, Any], path: str | os.PathLike[str]) -> WeightFile | None:
    """The sets of a file that has our label."""
    label = Label.of(content, path)
    if label is None:
        return None
    if not isinstance(content.get("state_dict"), Mapping):
        raise ValueError(f"{path} has the label of lightning-merge and no `state_dict`: it is not as it was written.")
    saved, holds = content["state_dict"], label.holds
    raw = None if label.raw is None else overlay(saved, label.raw, label.names)
    averages: dict[str, StoredSet | None] = {}
    elsewhere: dict[str, str] = {}
    for name, about in label.averages.items():
        state = (label.states or {}).get(name)
        rule = _rule(about.get("rule", ""))
        if rule is not None and rule.keeps_files and name != holds:
            elsewhere[name] = _ELSEWHERE.format(directory=getattr(rule, "directory", None))
        elif rule is not None and state is not None and raw is not None and holds_numbers(saved):
            averages[name] = _average(rule, about, state, raw, label.names, f"{path}: the state of `{name}`")
    sets = {holds: stored(saved, "in `state_dict`", of_lightning=True)}
    if holds in label.averages:
        held = averages.get(holds)
        share = None if held is None else held.initial_share
        updates = label.averages[holds].get("updates")
        sets[holds] = stored(saved, "in `state_dict`", updates, share, of_lightning=True)
    if raw is not None:
        sets.setdefault("raw", stored(raw, "beside it, to go on with", of_lightning=True))
    for name, average in averages.items():
        if average is not None:
            sets.setdefault(name, average)
    kind = "a full checkpoint of lightning-merge" if raw is not None else "a weights-only checkpoint of lightning-merge"
    return WeightFile(path, kind, sets, holds, content, elsewhere)


def synthesiser(file: WeightFile, name: str) -> tuple[PowerMeans, Callable[[float], StoredSet]]:
    """What makes the average of any width, of a post-hoc one that a full file has the state of.

    Raises:
        ValueError: If the file has no such state, or keeps the copies elsewhere.
    """
    label = Label.of(file.content, file.path)
    about = {} if label is None else label.averages
    rules_of = {each: _rule(inside.get("rule", "")) for each, inside in about.items()}
    rule, saved = rules_of.get(name), {} if label is None else (label.states or {}).get(name, {})
    if not isinstance(rule, PowerMeans) or saved.get("state") is None or label is None or label.raw is None:
        there = ", ".join(each for each, other in rules_of.items() if isinstance(other, PowerMeans)) or "none"
        raise ValueError(
            f"other widths are made from the state of a PostHocEMA, which {file.path} does not have of {name!r}. Give"
            f" a full checkpoint, as `<name>-final.ckpt`, and its set, FILE:SET (post-hoc averages in it: {there})."
        )
    if rule.keeps_files:
        raise ValueError(f"{file.path}: {_ELSEWHERE.format(directory=rule.directory)}")
    raw = overlay(file.content["state_dict"], label.raw, label.names)
    with as_written(f"{file.path}: the state of `{name}`"):
        state, buffers = rule.load(saved["state"], {}), saved["buffers"]

    def make(sigma: float) -> StoredSet:
        merged = {**rule.synthesise(state, sigma), **buffers}
        return stored(overlay(raw, merged, label.names), f"{name} of width {sigma:.4g}", of_lightning=True)

    return rule, make


def _average(
    rule: Rule,
    about: Mapping[str, Any],
    saved: Mapping[str, Any],
    raw: Mapping[str, Any],
    names: Mapping[str, str],
    what: str,
) -> StoredSet | None:
    """An average out of the state that it goes on with; ``None`` if it has none yet."""
    if saved.get("state") is None:
        return None
    with as_written(what):
        state = rule.load(saved["state"], {})
        merged = rule.result(state)
        if merged is None:
            return None
        weights = overlay(raw, {**merged, **saved["buffers"]}, names)
        share = rule.initial_share(state)
    return stored(weights, "as a state to go on with", about.get("updates"), share, of_lightning=True)


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
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None
    return rule if isinstance(rule, Rule) else None


def overlay(
    saved: Mapping[str, Any], merged: Mapping[str, Any], names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """``saved`` with the tensors of ``merged`` in place, which has canonical names and tied tensors once.

    Args:
        saved: Under the keys of the file.
        merged: What takes the place of some of them.
        names: The canonical names of keys, where the file says so. Of tied tensors that are not one in memory, as those
            of a folder, nothing else tells.
    """
    named, kept = tensors(merged), tensors(saved)
    placed = {key: _like(named[name], tensor) for key, name, tensor in _owners(kept, named) if name in named}
    owners = {canonical(key): tensor for key, tensor in kept.items()}
    for key, name in (names or {}).items():
        if key not in placed and key in kept and name in named:
            fitting = _laid_out(named[name], owners.get(name), kept[key])
            placed |= {} if fitting is None else {key: _like(fitting, kept[key])}
    return {**saved, **placed}


def _laid_out(merged: Tensor, owner: Tensor | None, saved: Tensor) -> Tensor | None:
    """What ``saved`` has of ``merged`` as it has it of ``owner``: it as it is, transposed or in another shape."""
    if merged.numel() != saved.numel() or merged.is_floating_point() != saved.is_floating_point():
        return None
    ways: list[Callable[[Tensor], Tensor]] = [
        lambda t: t,
        lambda t: t.mT if t.dim() > 1 else t,
        lambda t: t.reshape(saved.shape),
    ]
    for way in ways:
        if way(merged).shape == saved.shape and (owner is None or _equal(way(owner), saved)):
            return way(merged)
    return None


def _equal(first: Tensor, second: Tensor) -> bool:
    """Whether tensors are equal, as far as their numbers are read."""
    read = holds_numbers({"": first}) and holds_numbers({"": second})
    return first.shape == second.shape and (not read or torch.equal(first, second))


def _like(merged: Tensor, saved: Tensor) -> Tensor:
    return merged.to(saved.dtype) if holds_numbers({"": merged}) else merged  # else its place in the file counts


def _owners(saved: Weights, merged: Mapping[str, Tensor]) -> Iterator[tuple[str, str, Tensor]]:
    """Every key with the name that ``merged`` has for it: its own, or that of a key which is the same numbers."""
    by_storage = {_storage(t): canonical(key) for key, t in reversed(saved.items()) if canonical(key) in merged}
    for key, tensor in saved.items():
        name = canonical(key)
        yield key, name if name in merged else by_storage.get(_storage(tensor), ""), tensor


def _storage(tensor: Tensor) -> tuple[Any, ...]:
    if not tensor.numel():
        return (id(tensor),)
    if holds_numbers({"": tensor}):
        return (tensor.data_ptr(), tensor.shape, tensor.stride())
    return (tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.shape, tensor.stride())
