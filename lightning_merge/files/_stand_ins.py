"""What stands in a file's content for an object of a class that is not plain data."""

import pickle
from typing import Any, NoReturn, final


@final
class StandIn(dict[Any, Any]):
    """What a file holds of an object of a class that is not plain data; its items, if it was a kind of dict.

    Args:
        name: The class or function that the file names.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.data: list[Any] = []

    def __repr__(self) -> str:
        return f"<stands for {self.name}>"

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise pickle.PicklingError(f"{self.name} was not read, so that it cannot be written.")

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other


def stands_for(value: Any) -> str | None:
    """The first class of which something stands in a value, or in what the value holds."""
    waiting, seen = [value], {id(value)}  # what a value holds may hold the value
    while waiting:
        value = waiting.pop()
        if isinstance(value, StandIn):
            return value.name
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, _HOLDERS) else ()
        fresh = [part for part in parts if id(part) not in seen]
        seen.update(map(id, fresh))
        waiting.extend(reversed(fresh))
    return None


_HOLDERS = (list, tuple, set, frozenset)
