"""What a combiner is."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sized
from dataclasses import fields, is_dataclass, replace
from itertools import count
from typing import Any, Literal, Self, TypeAlias

import torch

from lightning_merge._checks import text, whole
from lightning_merge._mergeable import named
from lightning_merge.combiners._overflow import has_room, refuse_overflow, room_left
from lightning_merge.combiners._vectors import check_finite, check_vector
from lightning_merge.weights import State, Weights, copies, copy_, part, parts, to_devices, zeros

Locality: TypeAlias = Literal["element", "tensor", "model"]

_PIECE, _PIECES = 2**21, 8
"""Numbers whose tensors are merged together for each thread, up to so many: their sums stay in memory at hand."""


class Combiner(ABC):
    """How several models are merged, as a stream of task vectors: what each adds to the base they share.

    A task vector is ``weights - base`` (``task_vector``), and so is what comes back, with its scale applied: add it to
    the base (``add_vector``). A combiner is a frozen dataclass of hyperparameters; all it remembers is the state it is
    handed, a plain dict. Sums are kept in float32 (wider if the vectors are), whatever the training precision.
    """

    @property
    def removable(self) -> bool:
        """Whether ``remove`` takes a vector out again: only rules that are linear in the vectors can."""
        return False

    @property
    def needs_every_vector(self) -> bool:
        """Whether the state holds every vector, so that it grows with the number of tasks."""
        return False

    @property
    def locality(self) -> Locality:
        """The smallest part of a model that can be merged without seeing the rest."""
        return "element"

    def with_scale(self, scale: float | str) -> Self:
        """The same rule with another ``scale``.

        Args:
            scale: How far to go along the merged vector, in the range of the rule's own ``scale``.

        Raises:
            ValueError: If it has none, or the value is outside its range.
        """
        if not is_dataclass(self) or "scale" not in {field.name for field in fields(self)}:
            raise ValueError(f"`scale` must be left out for {self!r}, which has none, got {scale}.")
        return replace(self, scale=scale)

    @abstractmethod
    def init(self, like: Weights) -> State:
        """The state before the first vector. Only names, shapes, dtypes and devices of ``like`` count.

        Args:
            like: A task vector, or weights of the same names and shapes.
        """

    def update(self, state: State, vector: Weights, *, task: int | str = 0) -> None:
        """Takes a task vector into the state, in place. A vector that is refused leaves the state as it was.

        Args:
            state: What ``init`` or ``load`` gave.
            vector: Never written to.
            task: Which task it is, for messages and for rules that draw random numbers (``DARE``).

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If the vector has other names or shapes than the state, is sharded, holds integers, a NaN or an
                infinity, or numbers too large to be merged with what there is.
        """
        task = label("task", task)
        check_vector(vector, _tensors(state), task)
        self._update(state, vector, task)

    def _update(self, state: State, vector: Weights, task: int | str) -> None:
        """``update`` with a vector of the right names and shapes."""
        if not has_room(_tensors(state), vector):  # one read of one number, which is all it takes as a rule
            check_finite(vector, task)
            if beyond := room_left(_tensors(state), vector):
                self._make_room(state, beyond, task)
        self._take(state, vector, task)
        state["updates"] += 1

    def _make_room(self, state: State, names: list[str], task: int | str) -> None:
        """Gets ready for a vector that could make these tensors of the state too large for their type."""
        raise ValueError(
            f"`{names[0]}` in the vector of task {task} is too large to be merged with those before it in"
            f" {_tensors(state)[names[0]].dtype}: hand the vectors in as float64."
        )

    @abstractmethod
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        """``update`` without its checks; ``state["updates"]`` does not count this vector yet."""

    def result(self, state: State) -> Weights | None:
        """The merged task vector in tensors of its own, or ``None`` before the first update.

        Args:
            state: What ``init`` gave and ``update`` went on with.

        Raises:
            ValueError: If a number of it is too large for its type.
        """
        found = self._merged(state)
        if found is None:
            return None
        stored = {id(t) for value in state.values() if isinstance(value, dict) for t in value.values()}
        return refuse_overflow({name: copies({"": t})[""] if id(t) in stored else t for name, t in found.items()})

    @abstractmethod
    def _merged(self, state: State) -> Weights | None:
        """The merged task vector; may be tensors of the state."""

    def remove(self, state: State, vector: Weights, *, task: int | str = 0) -> None:
        """Takes a vector out again that was taken in under ``task``: exact up to the rounding of sums.

        Args:
            state: What ``init`` gave and ``update`` went on with; changed in place.
            vector: The vector as it was taken in.
            task: The name it was taken in under.

        Raises:
            TypeError: If the rule cannot (``removable``).
            ValueError: If the state is empty, or the vector does not fit.
        """
        task = label("task", task)
        if not self.removable:
            raise TypeError(
                f"{self} cannot take a vector out of what it merged: keep every vector and combine the others again."
            )
        if not state["updates"]:
            raise ValueError("there is no vector to remove: the state holds none.")
        check_vector(vector, _tensors(state), task)
        check_finite(vector, task)
        if state["updates"] == 1:  # what rounding would leave is nothing
            fresh = self.init(vector)
            state.clear()
            state.update(fresh)
            return
        self._take_out(state, vector, task)
        state["updates"] -= 1

    def _take_out(self, state: State, vector: Weights, task: int | str) -> None:
        """``remove`` without its checks; ``state["updates"]`` still counts this vector."""
        raise NotImplementedError

    @torch.no_grad()
    def combine(self, vectors: Iterable[Weights], tasks: Iterable[int | str] | None = None) -> Weights:
        """The merged vector of all of them: the same, bit for bit, as updating with each in turn.

        A list is merged part by part, so that each number moves through memory once. Anything else is a stream, of
        which one vector at a time is held.

        Args:
            vectors: At least one.
            tasks: A label for each; 0, 1, 2, ... if left out.

        Raises:
            TypeError: If an argument is of the wrong type.
            ValueError: If there is none, there are not as many ``tasks``, one of them is refused, or what comes out is
                too large for its type.
        """
        if isinstance(vectors, Mapping | str) or not isinstance(vectors, Iterable):
            raise TypeError(f"`vectors` must be several task vectors, got {type(vectors).__name__}.")
        labels = _labels(tasks)
        if isinstance(vectors, list | tuple) and vectors:
            together = [(_next(labels, index, tasks), vector) for index, vector in enumerate(vectors)]
            _refuse_more(tasks, len(vectors))
            return self._combine_parts(together)
        stream = iter(vectors)
        vector = next(stream, None)
        if vector is None:
            raise ValueError("`vectors`: there is no task vector to combine.")
        state, taken = self.init(dict(named("vectors", vector))), 0
        while vector is not None:
            self.update(state, vector, task=_next(labels, taken, tasks))
            taken += 1
            vector = None  # not held while the next one is made
            vector = next(stream, None)
        _refuse_more(tasks, taken)
        return refuse_overflow(self._last_result(state) or {})

    def _last_result(self, state: State) -> Weights | None:
        """``result`` of a state that nobody uses any more: it may be taken apart to save memory."""
        return self._merged(state)

    def _combine_parts(self, vectors: list[tuple[int | str, Weights]]) -> Weights:
        _, like = vectors[0]
        for task, vector in vectors:
            check_vector(vector, like, task)
        merged = zeros(like)
        for where in parts(merged, self.locality, size=_PIECE * min(torch.get_num_threads(), _PIECES)):
            target = part(merged, where)
            state = self.init(target)
            for task, vector in vectors:
                self._update(state, part(vector, where), task)
            copy_(target, self._merged(state) or {})
        return refuse_overflow(merged)

    def save(self, state: State) -> State:
        """What a file holds of the state.

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        return dict(state)

    def load(self, saved: State, devices: Mapping[str, torch.device]) -> State:
        """The state to go on with, from what ``save`` gave; each tensor on the device its name has in ``devices``.

        Args:
            saved: What ``save`` gave.
            devices: Devices by name of the tensor.
        """
        state: Any = to_devices(saved, devices)
        return dict(state)


def label(argument: str, task: int | str) -> int | str:
    """A task's label as Python has it: random masks follow from how it reads."""
    return str.__str__(text(argument, task)) if isinstance(task, str) else whole(argument, task)


def _labels(tasks: Any) -> Iterator[Any]:
    if tasks is None:
        return count()
    if isinstance(tasks, str | bytes) or not isinstance(tasks, Iterable):
        raise TypeError(f"`tasks` must be a label for each vector, got {tasks!r}.")
    return iter(tasks)


def _next(labels: Iterator[Any], taken: int, tasks: Any) -> int | str:
    for found in labels:
        return label("tasks", found)
    raise ValueError(f"`tasks` must hold a label for each vector, got {taken} for more vectors: {tasks!r}.")


def _refuse_more(tasks: Any, vectors: int) -> None:
    if isinstance(tasks, Sized) and len(tasks) != vectors:
        raise ValueError(f"`tasks` must hold a label for each vector, got {len(tasks)} for {vectors} vectors.")


def _tensors(state: State) -> Weights:
    """Tensors of the names and shapes that the state was made for."""
    tensors: Weights = next(value for value in state.values() if isinstance(value, dict))
    return tensors
