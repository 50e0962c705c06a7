"""What objects hold, read so fast that every step can ask whether anything was assigned or written to."""

import gc
from collections import deque
from collections.abc import Callable, Container, Iterable, Sequence
from itertools import chain
from operator import attrgetter, call, is_, itemgetter
from typing import Any, NamedTuple, TypeAlias, final

from torch import Tensor

Place: TypeAlias = tuple[int, str]
"""Which object, and which of its attributes or keys."""

MOST = 10_000
"""Items of a container, and containers and tensors in all, that are looked at."""

_VERSION = attrgetter("_version")


@final
class Watched:
    """The attributes of many objects, or the entries of many dicts.

    A step has driven them out of the caches, so each object that is touched costs a tenth of a microsecond. Of each,
    therefore, the number of entries is read, and the values of those that are not left out.

    Args:
        holders: Their dicts.
        ignored: By dict, the keys whose values are not looked at.

    Attributes:
        places: Of the values, in their order.
    """

    def __init__(self, holders: Sequence[dict[str, Any]], ignored: Sequence[Container[str]]) -> None:
        self._holders = list(holders)
        self._sizes = list(map(len, holders))
        self.places: list[Place] = []
        self._readers: list[Callable[[dict[str, Any]], tuple[Any, ...]]] = []
        self._read: list[dict[str, Any]] = []
        for number, (holder, known) in enumerate(zip(holders, ignored, strict=True)):
            keys = [key for key in holder if key not in known]
            if keys:
                keys = keys * 2 if len(keys) == 1 else keys  # of one key there would be no tuple
                self.places += [(number, key) for key in keys]
                self._readers.append(itemgetter(*keys))
                self._read.append(holder)

    def values(self) -> list[Any] | None:
        """What there is at each place, or nothing if entries have come or gone."""
        # Unpacked, they are fetched from memory side by side, and `len` need not wait for one after the other.
        if list(map(len, [*self._holders])) != self._sizes:
            return None
        try:
            return list(chain.from_iterable(map(call, self._readers, self._read)))
        except KeyError:
            return None


class Reading(NamedTuple):
    """What lay in containers at a moment, and how often tensors had been written to.

    It keeps what it read, so that nothing else is given the same identity.
    """

    items: list[Any]
    versions: list[int]

    def is_as(self, other: "Reading") -> bool:
        """Whether nothing has changed between two readings of the same contents."""
        return self.versions == other.versions and are_the_same(self.items, other.items)


@final
class Contents:
    """The containers among values and in them, and the tensors.

    Args:
        values: Any.
        left_out: Tensors that are not looked at.
        opened: What lies in an object of another class, as far as it is looked at: a dict, a list, or nothing.
        passed_by: Containers that are not looked into, by identity.
    """

    def __init__(
        self,
        values: Iterable[Any],
        left_out: Callable[[Tensor], bool] = lambda tensor: False,
        opened: Callable[[Any], Any] = lambda value: None,
        passed_by: Container[int] = (),
    ) -> None:
        self.containers: list[Any] = []
        self.tensors: list[Tensor] = []
        seen = set[int]()
        waiting = list(values)
        while waiting and len(seen) < MOST:
            value = waiting.pop()
            if isinstance(value, Tensor):
                if id(value) not in seen and not value.is_inference() and not left_out(value):
                    seen.add(id(value))
                    self.tensors.append(value)
            elif isinstance(value, tuple):
                waiting += value
            elif is_container(value):
                if id(value) not in seen and id(value) not in passed_by:
                    seen.add(id(value))
                    self.containers.append(value)
                    waiting += items_of(value)
            elif (inner := opened(value)) is not None:
                waiting.append(inner)

    def read(self) -> Reading:
        """As it is now."""
        return Reading(gc.get_referents(*self.containers), list(map(_VERSION, self.tensors)))


def is_container(value: Any) -> bool:
    """Whether it is one that can be written to, and small enough to be looked at."""
    return isinstance(value, dict | list | set | deque) and len(value) <= MOST


def items_of(container: Any) -> list[Any]:
    """What lies in it."""
    return list(container.values() if isinstance(container, dict) else container)


def are_the_same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(left) == len(right) and all(map(is_, left, right))
