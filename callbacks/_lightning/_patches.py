"""Methods of Lightning's objects replaced on the instance for the length of a fit, and put back."""

import functools
from collections.abc import Callable
from typing import Any


class Patches:
    """Replaces methods of instances, once each, and undoes all of it.

    Lightning has no hook around the whole of a validation run or of a saved ``state_dict``. Only the instance is
    touched, so other Trainers in the process see nothing.
    """

    def __init__(self) -> None:
        self._undo: list[tuple[Any, str, Any]] = []

    def replace(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Makes ``owner.name(*args)`` call ``around(original, *args)``."""
        original = getattr(owner, name)
        self._undo.append((owner, name, owner.__dict__.get(name)))

        @functools.wraps(original)  # `is_overridden` looks through `__wrapped__`
        def call(*args: Any, **kwargs: Any) -> Any:
            return around(original, *args, **kwargs)

        owner.__dict__[name] = call

    def __bool__(self) -> bool:
        """Whether anything is replaced at the moment."""
        return bool(self._undo)

    def undo(self) -> None:
        """Puts every method back; safe to call twice."""
        while self._undo:
            owner, name, before = self._undo.pop()
            if before is None:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before
