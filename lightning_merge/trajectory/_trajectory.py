"""The checkpoints of a run, or of several, as one sequence."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from lightning_merge._checks import instance, numbers, one_of, path, sequence, text, whole
from lightning_merge._mergeable import carried, put_constants
from lightning_merge.files._lazy import Checkpoint, WhichWeights
from lightning_merge.files._places import Place, memory_of
from lightning_merge.trajectory._run_files import run_files
from lightning_merge.weights import Weights, array, average_dtype, first_mismatch, is_averaged, nonfinite

_CHUNK = 2**17
"""Numbers that are merged at a time: what is written stays in the cache while every file adds to it."""


class _Buffer(NamedTuple):
    """The same memory in three views: making one takes the interpreter longer than adding up what is in it."""

    numbers: Tensor
    values: Any
    memory: memoryview


class Trajectory(Sequence[Checkpoint]):
    """Checkpoints of one model in order, opened and not read.

    Args:
        checkpoints: At least one.

    Attributes:
        left_out: Files of a run's folder that were left out, and why: of the same step as another one, the raw or
            averaged twin of a pair, or merged out of others.
        differing: Names of counters that differ among the files of the last ``combine``, which gave those of the last.

    Raises:
        ValueError: If there is none, or two are of different models; the first difference is named.
    """

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._checkpoints = [
            instance("checkpoints", each, Checkpoint, "checkpoints, each a `Checkpoint`")
            for each in sequence("checkpoints", checkpoints, "several checkpoints")
        ]
        self.left_out: dict[Path, str] = {}
        self.differing: list[str] = []
        if not self._checkpoints:
            raise ValueError("`checkpoints`: a trajectory needs at least one checkpoint, got none.")
        first = self._checkpoints[0]
        like = first.like
        for other in self._checkpoints[1:]:
            if difference := first_mismatch(like, other.like):
                raise ValueError(f"{other.path} is of another model than {first.path}: {difference}.")

    @classmethod
    def of_run(
        cls,
        folder: str | os.PathLike[str],
        pattern: str = "**/*.ckpt",
        weights: WhichWeights = "raw",
        start: int = 0,
        end: int | None = None,
        last: int | None = None,
    ) -> "Trajectory":
        """The checkpoints of one run by step (by the numbers in their names where files do not say); one per step.

        Args:
            folder: Searched with its subfolders.
            pattern: Which files, as ``Path.glob`` takes it.
            weights: ``"raw"`` or ``"published"``, see ``Checkpoint``.
            start: Least step.
            end: Largest step; ``None``: no limit.
            last: Keep so many of the latest, at least 1; ``None``: all.

        Raises:
            ValueError: If no file is left, a file cannot be read, they are of several runs, or ``last`` is out of
                range.
        """
        one_of("weights", weights, WhichWeights)
        text("pattern", pattern, "a pattern of file names")
        start, end = whole("start", start), None if end is None else whole("end", end)
        last = None if last is None else whole("last", last, 1)
        folder = Path(path("folder", folder))
        ordered, left_out = run_files(folder, pattern, weights, start, end)
        trajectory = cls(ordered if last is None else ordered[-last:])
        trajectory.left_out = left_out
        return trajectory

    @classmethod
    def of_files(cls, paths: Iterable[str | os.PathLike[str]], weights: WhichWeights = "published") -> "Trajectory":
        """Files in the order they are given, as those of several runs.

        Args:
            paths: Checkpoints, each a path or a URL.
            weights: Which set of a file that has both: ``"published"``, what validation measured, or ``"raw"``, what
                trained.
        """
        one_of("weights", weights, WhichWeights)
        files = [path("paths", file) for file in sequence("paths", paths, "several paths")]
        return cls(Checkpoint(file, weights) for file in files)

    @property
    def dropped(self) -> list[Path]:
        """The files of ``left_out``."""
        return list(self.left_out)

    def __len__(self) -> int:
        return len(self._checkpoints)

    @overload
    def __getitem__(self, index: int) -> Checkpoint: ...
    @overload
    def __getitem__(self, index: slice) -> "Trajectory": ...
    def __getitem__(self, index: int | slice) -> "Checkpoint | Trajectory":
        return Trajectory(self._checkpoints[index]) if isinstance(index, slice) else self._checkpoints[index]

    def stream(self) -> Iterator[Weights]:
        """The weights of one checkpoint after the other; one model is in memory if the caller keeps none."""
        return (checkpoint.weights() for checkpoint in self._checkpoints)

    @torch.no_grad()
    def combine(self, coefficients: Sequence[float]) -> Weights:
        """``sum_i coefficients[i] * weights_i`` in float32 (or wider), then in the dtype of the first file.

        Tied tensors stay tied. Counters (whole numbers, single or of 64 bits) and what modules keep beside their
        tensors are those of the last checkpoint that takes part; other whole numbers, flags and 8-bit floats must be
        the same in all. Memory: the result, and a part of one tensor.

        Args:
            coefficients: One finite number per checkpoint; files with 0 are not read.

        Raises:
            ValueError: If the number is wrong, the result holds a NaN or an infinity, or what has no mean differs.

        Example:
            >>> import tempfile, torch
            >>> from pathlib import Path
            >>> folder = Path(tempfile.mkdtemp())
            >>> for step in (1, 2):
            ...     weights = {"w": torch.tensor(float(step))}
            ...     torch.save({"state_dict": weights, "global_step": step}, folder / f"{step}.ckpt")
            >>> Trajectory.of_run(folder).combine([0.25, 0.75])
            {'w': tensor(1.7500)}
        """
        one, taking_part = self._merging(coefficients)
        names: dict[tuple[Place, ...], str] = {}  # of tied tensors the first
        for name in self._checkpoints[0].places:
            names.setdefault(self._places(name, taking_part), name)
        if torch.get_num_threads() == 1:  # handing over to one thread costs as much as the reading
            tensors = [one(name) for name in names.values()]
        else:
            with ThreadPoolExecutor(torch.get_num_threads()) as threads:
                tensors = list(threads.map(one, names.values()))
        done = dict(zip(names, tensors, strict=True))
        merged = {name: done[self._places(name, taking_part)] for name in self._checkpoints[0].places}
        return {**merged, **taking_part[-1][0].extra}

    def merging(self, coefficients: Sequence[float]) -> Callable[[str], Tensor]:
        """What gives one tensor of ``combine(coefficients)`` by its name.

        Args:
            coefficients: As for ``combine``.

        Raises:
            ValueError: As ``combine``, at once or when a tensor is asked for.
        """
        return self._merging(coefficients)[0]

    def _merging(self, coefficients: Sequence[float]) -> tuple[Callable[[str], Tensor], list[tuple[Checkpoint, float]]]:
        coefficients = numbers("coefficients", coefficients, says=f"{len(self)} finite numbers")
        if len(coefficients) != len(self):
            raise ValueError(f"`coefficients` must be {len(self)} finite numbers, got {coefficients}.")
        taking_part = [(c, float(a)) for c, a in zip(self._checkpoints, coefficients, strict=True) if a]
        if not taking_part:
            raise ValueError("`coefficients` must not all be 0.")
        self.differing = []
        scratch = threading.local()  # new memory for every tensor would cost more than what is read into it
        return lambda name: self._combine(name, taking_part, vars(scratch)), taking_part

    @staticmethod
    def _places(name: str, taking_part: list[tuple[Checkpoint, float]]) -> tuple[Place, ...]:
        return tuple(checkpoint.places[name] for checkpoint, _ in taking_part)

    @torch.no_grad()
    def _combine(self, name: str, taking_part: list[tuple[Checkpoint, float]], scratch: dict[str, _Buffer]) -> Tensor:
        at = self._checkpoints[0].places[name]
        averaged = [_is_averaged(checkpoint.places[name].dtype) for checkpoint, _ in taking_part]
        if not any(averaged):
            return carried(name, (checkpoint.tensor(name) for checkpoint, _ in taking_part), self.differing)
        if not all(averaged):
            self._refuse_mixture(name, taking_part)
        merged = torch.empty(at.shape, dtype=at.dtype)
        if all(place.is_dense for place in self._places(name, taking_part)):
            is_mean = len({coefficient for _, coefficient in taking_part}) == 1
            with np.errstate(all="ignore"):
                if self._combine_dense(name, merged.view(-1), taking_part, scratch, is_mean):
                    return merged
                if is_mean and nonfinite({name: merged}):  # a sum may be too large where its mean is not
                    self._combine_dense(name, merged.view(-1), taking_part, scratch, is_mean=False)
        else:
            total = torch.zeros(at.shape, dtype=average_dtype(merged))
            for checkpoint, coefficient in taking_part:
                total.add_(checkpoint.tensor(name).to(total), alpha=coefficient)
            merged.copy_(total)
        if nonfinite({name: merged}) and not put_constants(merged, [c.tensor(name) for c, _ in taking_part]):
            self._refuse(name, taking_part)
        return merged

    @staticmethod
    def _combine_dense(
        name: str,
        merged: Tensor,
        taking_part: list[tuple[Checkpoint, float]],
        scratch: dict[str, _Buffer],
        is_mean: bool,
    ) -> bool:
        """Chunk by chunk, so that what is added to stays in the cache while every file adds to it.

        A mean is multiplied by the coefficient that all share at the end.

        Returns whether all is known to be finite; the sum that tells may itself be too large for its type.
        """
        wide = average_dtype(merged)
        target = array(merged)
        same = is_finite = wide == merged.dtype  # else it may be too large for its own type alone
        for start in range(0, merged.numel(), _CHUNK):
            size = min(_CHUNK, merged.numel() - start)
            summed = target[start : start + size] if same else _buffer(scratch, "sum", wide).values[:size]
            for index, (checkpoint, coefficient) in enumerate(taking_part):
                buffer = _buffer(scratch, "read", checkpoint.places[name].dtype)
                checkpoint.read_into(buffer.memory[: size * buffer.numbers.itemsize], name, start)
                values = buffer.values[:size] if buffer.numbers.dtype == wide else array(buffer.numbers[:size].to(wide))
                if not is_mean:
                    values *= coefficient
                if index:
                    summed += values
                else:
                    summed[...] = values
            if is_mean:
                summed *= taking_part[0][1]
            if same:
                is_finite = is_finite and bool(np.isfinite(summed.sum()))
            else:
                merged[start : start + size] = torch.as_tensor(summed)
        return is_finite

    @staticmethod
    def _refuse_mixture(name: str, taking_part: list[tuple[Checkpoint, float]]) -> None:
        kinds = {checkpoint.places[name].dtype: checkpoint.path for checkpoint, _ in taking_part}
        found = ", ".join(f"{str(dtype).removeprefix('torch.')} in {path}" for dtype, path in kinds.items())
        raise ValueError(f"`{name}` cannot be averaged where files hold numbers of different kinds: {found}.")

    def _refuse(self, name: str, taking_part: list[tuple[Checkpoint, float]]) -> None:
        for checkpoint, _ in taking_part:
            if nonfinite({name: checkpoint.tensor(name)}):
                raise ValueError(f"`{name}` of {checkpoint.path} holds a NaN or an infinity. Leave that file out.")
        raise ValueError(f"`{name}` is too large for its dtype with these coefficients.")


def _is_averaged(dtype: torch.dtype) -> bool:
    return is_averaged(torch.empty(0, dtype=dtype))


def _buffer(scratch: dict[str, _Buffer], use: str, dtype: torch.dtype) -> _Buffer:
    key = f"{use} {dtype}"
    if key not in scratch:
        numbers = torch.empty(_CHUNK, dtype=dtype)
        scratch[key] = _Buffer(numbers, array(numbers), memory_of(numbers))
    return scratch[key]
