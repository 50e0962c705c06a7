"""Sets of weights, under the names of a plain module."""

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from lightning_merge.files._sharded import is_part
from lightning_merge.files._stand_ins import stands_for
from lightning_merge.weights import Weights, canonical

_AVERAGES = {"ema", "swa", "average", "averaged", "avg"}
DDP = "module."
"""What ``DistributedDataParallel`` and ``DataParallel`` put before every name."""


@dataclass(frozen=True)
class StoredSet:
    """One set of weights in a file.

    Args:
        weights: Tensors under the names that a plain module's ``load_state_dict`` takes.
        where: Where in the file it is, in words.
        updates: How many weights were merged into it, where that is known.
        initial_share: Share of it that is still the weights of the start, where that is known.
        extra: What modules keep beside their tensors (``get_extra_state``), under its names; of stand-ins nothing.
        stripped: Prefix that every name has in the file.
        left_out: Names of what stands in the file for objects that are not plain data.
        keys: The key in the file of every name that has another one there.
        file: The file it is in, if that is another one.
        of_lightning: Whether the names are those of a module that Lightning saved.
    """

    weights: Weights
    where: str
    updates: int | None = None
    initial_share: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    stripped: str = ""
    left_out: tuple[str, ...] = ()
    keys: Mapping[str, str] = field(default_factory=dict)
    file: Path | None = None
    of_lightning: bool = False

    @property
    def as_saved(self) -> dict[str, Any]:
        """The same under the keys of the file, which a module takes that is wrapped as the one that wrote it."""
        return {self.keys.get(name, name): value for name, value in self.state_dict.items()}

    @property
    def state_dict(self) -> dict[str, Any]:
        """All that a plain module's strict ``load_state_dict`` asks for."""
        return {**self.weights, **self.extra}


@dataclass(frozen=True)
class WeightFile:
    """What a file holds.

    Args:
        path: The file.
        kind: What wrote it, in words.
        sets: By name: ``raw``, ``average``, the name of an average, or ``weights`` where there is only one.
        default: The set that the file's score was measured on, as far as that is known.
        content: All of the file.
        elsewhere: Sets of which the file only says where they are, and why they were not read from there.
        by_key: Whether sets are called as in the file, so that the name alone says which is an average.
    """

    path: str | os.PathLike[str]
    kind: str
    sets: dict[str, StoredSet]
    default: str
    content: Any = field(repr=False)
    elsewhere: Mapping[str, str] = field(default_factory=dict)
    by_key: bool = False

    @property
    def raw(self) -> str | None:
        """The set that training works on; ``None`` if there are averages only."""
        if (plain := next((name for name in ("raw", "weights") if name in self.sets), None)) is not None:
            return plain
        return next((name for name in self.sets if not is_average_name(name)), None) if self.by_key else None

    @property
    def name(self) -> str:
        """The name of the file, without its folder."""
        return os.fspath(self.path).replace(os.sep, "/").rpartition("/")[2]

    def choose(self, name: str | None = None) -> StoredSet:
        """The set of this name, or the default one.

        Raises:
            ValueError: If there is none of this name, or tensors of it were not read since they are no plain data.
        """
        chosen = self.default if name is None else name
        if chosen not in self.sets:
            why = f" {self.elsewhere[chosen]}" if chosen in self.elsewhere else ""
            raise ValueError(
                f"{self.path} holds no set called {chosen!r}. It is {self.kind} and holds: {', '.join(self.sets)}.{why}"
            )
        found = self.sets[chosen]
        if lost := [name for name in found.left_out if not is_extra(name)]:
            raise ValueError(
                f"{self.path}: `{lost[0]}` is a tensor of a class of its own, which cannot be read without running code"
                f" of that class ({len(lost)} of them in all). Save plain tensors."
            )
        return found


def stored(
    state: Mapping[str, Any], where: str, updates: int | None = None, initial_share: float | None = None, **how: bool
) -> StoredSet:
    """A set out of a state dict, under canonical names.

    Args:
        state: Tensors, and what modules keep beside them.
        where: As in ``StoredSet``.
        updates: Likewise.
        initial_share: Likewise.
        how: ``of_lightning``, whose files never have the prefix of DDP: there a name that begins so is the module's.
    """
    names = plain_names([key for key in state if not is_part(key)])
    prefix = DDP if names and not how.get("of_lightning") and all(n.startswith(DDP) for n in names.values()) else ""
    named = {names[key].removeprefix(prefix): value for key, value in state.items() if key in names}
    return StoredSet(
        {name: value for name, value in named.items() if isinstance(value, Tensor) and not is_extra(name)},
        where,
        updates,
        initial_share,
        {name: value for name, value in named.items() if is_extra(name) and stands_for(value) is None},
        prefix,
        tuple(name for name, value in named.items() if stands_for(value) is not None),
        {name.removeprefix(prefix): key for key, name in names.items() if name.removeprefix(prefix) != key},
        of_lightning=how.get("of_lightning", False),
    )


def weights_in(content: Mapping[str, Any], expected: Collection[str] = ()) -> Weights:
    """The tensors under ``state_dict`` in the content of a file, or of a state dict, under canonical names.

    Args:
        content: Of a file.
        expected: Names of the model, in which a module may be called ``module``.
    """
    state = content.get("state_dict", content)
    if not isinstance(state, Mapping):
        return {}
    keeps = "pytorch-lightning_version" in content or any(name.startswith(DDP) for name in expected)
    return stored(state, "", of_lightning=keeps).weights


def plain_names(state: Iterable[str]) -> dict[str, str]:
    """The canonical name of every key; all stay as they are if two would become one."""
    names = {str(key): canonical(str(key)) for key in state}
    return names if len(set(names.values())) == len(names) else {name: name for name in names}


def is_average_name(key: str) -> bool:
    """Whether a key of a file says that an average is under it.

    Example:
        >>> [is_average_name(key) for key in ("model_ema", "ema", "schema", "model")]
        [True, True, False, False]
    """
    return not _AVERAGES.isdisjoint(re.split(r"[^a-z]+", key.lower()))


def is_extra(name: str) -> bool:
    """Whether it is the name of what a module keeps beside its tensors; not a number to be averaged."""
    return name.rpartition(".")[2] == "_extra_state"


def tensors(state: Mapping[str, Any]) -> Weights:
    """The tensors of a state dict."""
    return {str(name): value for name, value in state.items() if isinstance(value, Tensor)}


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


def sources_of(content: Any) -> list[Any]:
    """The files that ``lightning-merge average`` or ``soup`` merged into this one; none of any other file."""
    about = content.get("provenance") if isinstance(content, Mapping) else None
    files = about.get("files") if isinstance(about, Mapping) and "rule" in about else None
    return files if isinstance(files, list) else []


def holds_numbers(state: Mapping[str, Any]) -> bool:
    """Whether its tensors were read, not only where they are."""
    first = next(iter(tensors(state).values()), None)
    return first is None or not (first.is_meta or isinstance(first, FakeTensor))


def bytes_of(weights: Mapping[str, Tensor]) -> int:
    """Bytes that the tensors take."""
    return sum(t.numel() * t.element_size() for t in weights.values())


def contiguous(weights: Mapping[str, Tensor]) -> Weights:
    """Each tensor in memory of its own, as safetensors wants it."""
    return {
        name: t.detach().clone(memory_format=torch.contiguous_format)
        if t.layout == torch.strided
        else t.detach().clone()
        for name, t in weights.items()
    }
