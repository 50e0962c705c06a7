"""What the API reference shows: the names that ``tests/public_names.txt`` records, and no others."""

import re
from pathlib import Path
from typing import Any

import griffe

RECORD = Path(__file__).parents[1] / "tests" / "public_names.txt"


class PublicOnly(griffe.Extension):
    """Hides methods that are not recorded: Lightning's hooks, what a class inherits, and what the library calls itself.

    What a callback has beside is in the ``Attributes`` of its docstring.
    """

    def __init__(self) -> None:
        names = [line.partition("(")[0] for line in RECORD.read_text(encoding="utf-8").splitlines()]
        self.recorded = {
            ".".join(name.split(".")[-2:]) for name in names
        }  # of a method the class, wherever it is defined

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """An example is code, which the reader of docstrings knows by the plural alone."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        of_lightning = cls.path.startswith(
            tuple(f"lightning_merge.{part}." for part in ("callbacks", "compat", "recipes"))
        )
        for name, member in list(cls.members.items()):
            recorded = name == "__init__" or f"{cls.name}.{name}" in self.recorded
            if not recorded and (member.is_function or of_lightning):
                del cls.members[name]
