"""What training steps write into: tensors, containers and objects that a module keeps as plain attributes."""

from collections.abc import Container, Sequence
from typing import Any, final

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_merge._attributes import live_attributes
from lightning_merge.branches._watched import Contents, are_the_same
from lightning_merge.callbacks._branch_run._kept import Found, Kept
from lightning_merge.weights import is_metric

_CLOSELY = 8
"""Turns after which all numbers are looked at. Later a write is seen where torch counts it."""
_PLAIN = (int, float, str, type(None))
_LARGE = 256 * 2**20
"""Bytes of all tensors of which copies are made, so that branches may have their own."""


@final
class Written:
    """Gives each branch its own of what steps write into, once one has.

    That holds for tensors, for objects, and for containers in which a step replaces something. What a step makes longer
    is a record of all branches, which share it, as they share numbers and what is computed anew in every forward pass.

    Args:
        title: What messages call the branches.

    Attributes:
        is_stale: Whether there may be other things in what was looked through.
        places: Which of the values that were looked through have parts that are the branches' own.
    """

    def __init__(self, title: str) -> None:
        self.is_stale = False
        self.places: set[int] = set()
        self._title = title
        self._values: list[Any] = []  # what was looked through last
        self._names: Sequence[str] = ()
        self._shared: dict[int, Any] = {}  # what is a record of all, or too large, by identity
        self._found: dict[int, Found] = {}  # all else
        self._objects = set[int]()  # of it, the attributes of objects
        self._own: list[Found] = []  # of it, what branches have their own of
        self._contents = Contents(())  # the rest
        self._reading = self._contents.read()
        self._turns = 0
        self._last = 0

    def knows(self, values: list[Any]) -> bool:
        """Whether these were looked through, apart from what cannot be written into."""
        if are_the_same(self._values, values):
            return True
        known, now = ([v for v in each if not isinstance(v, _PLAIN)] for each in (self._values, values))
        return are_the_same(known, now)

    def look(self, names: Sequence[str], values: list[Any], of_the_module: Container[int]) -> None:
        """Looks through values for what can be written into.

        Args:
            names: Of attributes.
            values: What the module has there.
            of_the_module: Storages, and submodules, that are seen to elsewhere, by their addresses.
        """
        self._names, self._values, self.is_stale = names, values, False
        self._objects = set[int]()

        def is_left_out(tensor: Tensor) -> bool:
            return tensor.grad_fn is not None or storage_of(tensor) in of_the_module

        def opened(value: Any) -> Any:
            if not isinstance(value, nn.Module):
                attributes = live_attributes(value)
                self._objects.add(id(attributes))
                return attributes
            return None if id(value) in of_the_module or is_metric(value) else [*value.parameters(), *value.buffers()]

        contents = Contents(values, is_left_out, opened, self._shared)
        before, self._found, size = self._found, {}, 0
        for each in [*contents.containers, *contents.tensors]:
            size += each.nbytes if isinstance(each, Tensor) else 0
            if id(each) not in self._shared:
                known = before.get(id(each))
                self._found[id(each)] = known if known is not None else Found(each, size <= _LARGE)
        self._settle()

    def put(self, branch: int) -> None:
        """Puts what a branch has of its own in place."""
        for each in self._own:
            each.of(branch).put()

    def leave(self, branch: int) -> None:
        """Keeps what the turn has written."""
        self._turns += 1
        is_close = self._turns <= _CLOSELY and self._contents.tensors
        if is_close or not self._contents.read().is_as(self._reading):
            self._sort()
        for each in self._own:
            each.own[branch] = Kept(each.value)
        self._last = branch

    def forget(self, branch: int) -> None:
        """The branch goes on from what there was before."""
        for each in self._own:
            each.own.pop(branch, None)
            if branch == self._last:
                each.of(branch).put()

    def take_in(self) -> None:
        """What was written since ``leave`` is where all branches go on from."""
        if not self._contents.read().is_as(self._reading):
            for each in self._changed(closely=False):
                if each.why_shared(is_object=id(each.value) in self._objects) is None:
                    each.begin()
                else:  # what hooks make longer is a record as well
                    self._shared[id(each.value)] = self._found.pop(id(each.value)).value
            self.is_stale = True  # there may be other things in it
        for each in self._own:
            # On a device that would be waited for at every batch.
            closely = self._turns <= _CLOSELY or not isinstance(each.value, Tensor) or each.value.is_cpu
            if not each.of(self._last).is_now(closely=closely):
                each.begin()

    def _changed(self, *, closely: bool) -> list[Found]:
        """What is other than all branches have gone on from, of what none has its own of."""
        found = self._found.values()
        return [each for each in found if not each.is_own and not each.is_as_it_was(closely=closely)]

    def _sort(self) -> None:
        """Finds what the turn has written, and whose it is."""
        for each in self._changed(closely=self._turns <= _CLOSELY):
            is_object = id(each.value) in self._objects
            if (why := each.why_shared(is_object=is_object)) is not None:
                self._say(each.value, why)
                self._shared[id(each.value)] = self._found.pop(id(each.value)).value
            elif is_object or each.has_new_things():
                each.is_own = True
            else:
                each.begin()
        self._settle()
        self.places = {n for n, each in enumerate(self._values) if any(inner.is_own for inner in self._things_in(each))}

    def _settle(self) -> None:
        self._own = [each for each in self._found.values() if each.is_own]
        rest = [each.value for each in self._found.values() if not each.is_own]
        self._contents.containers = [each for each in rest if not isinstance(each, Tensor)]
        self._contents.tensors = [each for each in rest if isinstance(each, Tensor)]
        self._reading = self._contents.read()

    def _things_in(self, value: Any) -> list["Found"]:
        return [self._found[id(each)] for each in _within(value) if id(each) in self._found]

    def _say(self, value: Any, why: str) -> None:
        places = zip(self._names, self._values, strict=True)
        within = [name for name, each in places if any(inner is value for inner in _within(each))]
        rank_zero_info(
            f"{self._title}: `{within[0] if within else type(value).__name__}` of the module {why}, and all branches"
            " share it. If steps depend on it, let `training_step` assign a new one to the attribute instead of writing"
            " into it: then each branch has its own."
        )


def _within(value: Any) -> list[Any]:
    contents = Contents([value], opened=lambda each: None if isinstance(each, nn.Module) else live_attributes(each))
    return [*contents.containers, *contents.tensors]


def storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata) if tensor.layout is torch.strided else 0
