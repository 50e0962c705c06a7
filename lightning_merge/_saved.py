"""State of a callback, declared once: a dataclass with one field for each key of its section of a file."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass
class Saved:
    """Base of what a callback saves; the fields of a subclass are the keys of its section.

    A field that is itself of a subclass of ``Saved`` is a section within the section. A field whose default is ``None``
    is left out of the section while it is ``None``, and may be missing when a section is read: a key that older files
    do not have, or that only some callbacks write.

    Example:
        >>> @dataclass
        ... class Counts(Saved):
        ...     updates: int
        ...     logged: int | None = None
        >>> Counts(3).section()
        {'updates': 3}
        >>> Counts.of({"updates": 3, "logged": 2})
        Counts(updates=3, logged=2)
    """

    def section(self) -> dict[str, Any]:
        """The section of a file. Values are not copied."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        left_out = {field.name for field in fields(self) if field.default is None and values[field.name] is None}
        return {
            name: value.section() if isinstance(value, Saved) else value
            for name, value in values.items()
            if name not in left_out
        }

    @classmethod
    def of(cls, section: Mapping[str, Any]) -> Self:
        """Reads a section; keys that no field declares are dropped.

        Raises:
            KeyError: If a key is missing.
        """
        found: dict[str, Any] = {}
        for field in fields(cls):
            if field.default is None and field.name not in section:
                continue
            value = section[field.name]
            nested = isinstance(field.type, type) and issubclass(field.type, Saved)
            found[field.name] = field.type.of(value) if nested else value  # type: ignore[union-attr]
        return cls(**found)
