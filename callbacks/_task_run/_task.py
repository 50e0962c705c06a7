"""What the data module says of a task: its name and its classes."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

from lightning_merge._checks import word
from lightning_merge.continual._heads import checked_classes
from lightning_merge.weights import Weights


def classes_of(trainer: Any, heads: str) -> list[int] | None:
    """The classes of the task, if its data module names them and the head has rows for them.

    Args:
        trainer: The Trainer.
        heads: What becomes of the head.

    Raises:
        ValueError: If they are no distinct numbers of rows.
    """
    data = getattr(trainer, "datamodule", None)
    classes = getattr(data, "classes", None)
    if classes is None or heads != "grow":
        return None
    try:
        found = checked_classes(classes)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"`classes` of {type(data).__name__} must be the class numbers of the task, which are rows of the head, got"
            f" {classes!r}. Give numbers (`range({_count(classes)})`), `None` if every task has all of them, or choose"
            " another `heads`."
        ) from error
    if len(set(found)) < len(found) or min(found) < 0:
        raise ValueError(
            f"`classes` of {type(data).__name__} must be distinct rows of the head, at least 0, got {found}."
        )
    return found


def refuse_known_classes(classes: Sequence[int] | None, known: Weights) -> None:
    """Checks that a growing head has no rows of these classes yet.

    Args:
        classes: Of the task that begins, if its data names them.
        known: Class numbers by title of an earlier task.

    Raises:
        ValueError: If an earlier task had one of them.
    """
    for task, earlier in known.items():
        if both := sorted(set(classes or ()) & set(earlier.tolist())):
            raise ValueError(
                f"class {both[0]} was in {task} already, whose rows of the head would be written over. In a"
                " class-incremental stream no class is in two tasks; for a domain-incremental one give data without"
                " `classes`."
            )


def title_of(trainer: Any, task: int, known: Sequence[int | str]) -> str:
    """What the data module calls the task if that is a name, or its number.

    Args:
        trainer: The Trainer.
        task: Its number.
        known: Names of the tasks of the bank.

    Raises:
        ValueError: If the name is in the bank already, or cannot be part of a file's.
    """
    data = getattr(trainer, "datamodule", None)
    given = getattr(data, "task", None)
    if isinstance(given, Enum):
        given = given.value
    is_name = isinstance(given, str | int) and not isinstance(given, bool)
    title = word("task", str(given)) if is_name else f"task{task}"
    if title in known:
        raise ValueError(
            f"`task` of {type(data).__name__} is {title!r}, and the bank has a task of this name: {list(known)}. Set"
            f" another on each data module (`datamodule.task = 'task{task}'`)."
            if is_name
            else f"the bank has a task {title!r} already: give this one a name, as `task` of its data module."
        )
    return title


def _count(classes: Any) -> int:
    """How many classes were meant."""
    if isinstance(classes, int) and classes > 0:
        return classes
    return len(classes) if hasattr(classes, "__len__") and len(classes) else 2
