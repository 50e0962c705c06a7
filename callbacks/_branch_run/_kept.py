"""Tensors and containers as all branches go on from them, and as each has them."""

from typing import Any, final

import torch
from torch import Tensor

from lightning_merge._undo import undo_of
from lightning_merge.branches._watched import are_the_same, items_of


@final
class Found:
    """A tensor or a container, as all branches go on from it, and as each has it once steps have changed it.

    Args:
        value: The tensor or the container.
        is_copied: Whether a copy of a tensor is made.
    """

    def __init__(self, value: Any, is_copied: bool) -> None:
        self.value = value
        self.own: dict[int, Kept] = {}
        self.is_own = False
        self._is_copied = is_copied
        self.begin()

    def begin(self) -> None:
        """All branches go on from what there is now."""
        self._start = Kept(self.value, self._is_copied)
        self.own = {}

    def of(self, branch: int) -> "Kept":
        return self.own.get(branch, self._start)

    def is_as_it_was(self, *, closely: bool) -> bool:
        return self._start.is_now(closely=closely)

    def why_shared(self, *, is_object: bool) -> str | None:
        """Why all branches share what a turn has changed, if they do.

        Args:
            is_object: Whether it is the attributes of an object.
        """
        if isinstance(self.value, Tensor):
            return None if self._is_copied else "is written by steps and too large for a copy of each branch"
        is_record = getattr(self.value, "maxlen", None) is None and not is_object
        return "grows with each step" if is_record and len(self.value) > len(self._start.items) else None

    def has_new_things(self) -> bool:
        """Whether something else has changed than numbers, and than what is computed anew in every forward pass."""
        if isinstance(self.value, Tensor):
            return True
        now, was = items_of(self.value), self._start.items
        replaced = [new for new, old in zip(now, was, strict=False) if new is not old]
        return len(now) != len(was) or not all(map(is_shared, replaced))


@final
class Kept:
    """What a tensor or a container holds at the moment.

    Args:
        value: The tensor or the container.
        is_copied: Whether a copy of a tensor is made.
    """

    def __init__(self, value: Any, is_copied: bool = True) -> None:
        self._value = value
        is_tensor = isinstance(value, Tensor)
        self._version = value._version if is_tensor else -1
        self._copy = value.detach().clone() if is_tensor and is_copied else None
        self._undo = None if is_tensor else undo_of(value)
        self.items: list[Any] = [] if is_tensor else items_of(value)

    def is_now(self, *, closely: bool) -> bool:
        """Whether it holds the same still.

        Args:
            closely: Whether numbers are looked at where torch has counted no write.
        """
        if not isinstance(self._value, Tensor):
            return are_the_same(items_of(self._value), self.items)
        now, copy = self._value.detach(), self._copy
        if copy is None or not closely or self._version != self._value._version:
            return self._version == self._value._version
        return now.shape == copy.shape and bool(((now == copy) | (now != now)).all())  # a NaN is itself

    @torch.no_grad()
    def put(self) -> None:
        """Makes it hold that again."""
        if self._copy is None:
            if self._undo is not None:
                self._undo()
        elif self._value.shape == self._copy.shape:
            self._value.data.copy_(self._copy)
        else:
            self._value.data = self._copy.clone()


def is_shared(value: Any) -> bool:
    """A number, or what is computed anew in every forward pass, as the weight of a parametrisation."""
    return isinstance(value, int | float) or (isinstance(value, Tensor) and value.grad_fn is not None)
