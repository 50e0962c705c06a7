"""What a combiner is."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any, Literal, TypeAlias

import torch

from lightning_merge.combiners._vectors import check_finite, check_vector
from lightning_merge.weights import State, Weights, copy_, part, parts, to_devices, zeros

Locality: TypeAlias = Literal["element", "tensor", "model"]

_PIECE = 2**24
"""Numbers whose tensors are merged together: enough of them for all threads."""


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

    @abstractmethod
    def init(self, like: Weights) -> State:
        """The state before the first vector. Only names, shapes, dtypes and devices of ``like`` count."""

    def update(self, state: State, vector: Weights, *, task: int | str = 0) -> None:
        """Takes a task vector into the state, in place. A vector that is refused leaves the state as it was.

        Args:
            state: What ``init`` or ``load`` gave.
            vector: Never written to.
            task: Which task it is, for messages and for rules that draw random numbers (``DARE``).

        Raises:
            ValueError: If the vector has other names or shapes than the state, is sharded, or holds integers, a NaN or
                an infinity.
        """
        check_vector(vector, _tensors(state), task)
        check_finite(vector, task)
        self._take(state, vector, task)
        state["updates"] += 1

    @abstractmethod
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        """``update`` without its checks; ``state["updates"]`` does not count this vector yet."""

    @abstractmethod
    def result(self, state: State) -> Weights | None:
        """The merged task vector, or ``None`` before the first update. May be the stored tensors: do not write."""

    def remove(self, state: State, vector: Weights, *, task: int | str = 0) -> None:
        """Takes a vector out again that was taken in under ``task``: exact up to the rounding of sums.

        Raises:
            TypeError: If the rule cannot (``removable``).
            ValueError: If the state is empty, or the vector does not fit.
        """
        if not self.removable:
            raise TypeError(
                f"{self} cannot take a vector out of what it merged: keep every vector and combine the others again."
            )
        if not state["updates"]:
            raise ValueError("there is no vector to remove: the state holds none.")
        check_vector(vector, _tensors(state), task)
        check_finite(vector, task)
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
            ValueError: If there is none, or one of them is refused.
        """
        if isinstance(vectors, list | tuple) and vectors:
            labels = list(range(len(vectors)) if tasks is None else tasks)
            return self._combine_parts(list(zip(labels, vectors, strict=True)))
        names = count() if tasks is None else iter(tasks)
        stream = iter(vectors)
        vector = next(stream, None)
        if vector is None:
            raise ValueError("there is no task vector to combine.")
        state = self.init(vector)
        while vector is not None:
            self.update(state, vector, task=next(names))
            vector = None  # not held while the next one is made
            vector = next(stream, None)
        return self._last_result(state) or {}

    def _last_result(self, state: State) -> Weights | None:
        """``result`` of a state that nobody uses any more: it may be taken apart to save memory."""
        return self.result(state)

    def _combine_parts(self, vectors: list[tuple[int | str, Weights]]) -> Weights:
        _, like = vectors[0]
        for task, vector in vectors:
            check_vector(vector, like, task)
        merged = zeros(like)
        for where in parts(merged, self.locality, size=_PIECE):
            target = part(merged, where)
            state = self.init(target)
            for task, vector in vectors:
                check_finite(piece := part(vector, where), task)
                self._take(state, piece, task)
                state["updates"] += 1
            copy_(target, self.result(state) or {})
        return merged

    def save(self, state: State) -> State:
        """What a file holds of the state."""
        return dict(state)

    def load(self, saved: State, devices: Mapping[str, torch.device]) -> State:
        """The state to go on with, from what ``save`` gave; each tensor on the device its name has in ``devices``."""
        state: Any = to_devices(saved, devices)
        return dict(state)


def _tensors(state: State) -> Weights:
    """Tensors of the names and shapes that the state was made for."""
    tensors: Weights = next(value for value in state.values() if isinstance(value, dict))
    return tensors
