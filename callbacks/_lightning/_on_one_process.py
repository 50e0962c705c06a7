"""Work that one process does for all."""

from collections.abc import Callable
from typing import Any, TypeVar

Made = TypeVar("Made")


def on_one_process(trainer: Any, work: Callable[[], Made]) -> Made:
    """Returns or raises in every process what the first one makes or raises: files are read and written once."""
    made: tuple[Any, Exception | None] = None, None
    if trainer.is_global_zero:
        try:
            made = work(), None
        except Exception as error:
            made = None, error
    result, failure = trainer.strategy.broadcast(made)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]
