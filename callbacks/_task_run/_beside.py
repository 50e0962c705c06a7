"""Other callbacks of the Trainer of a task, in which an earlier task may live on."""

import math
from typing import Any
from weakref import WeakSet

from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._callback import Published

_WRITE_WEIGHTS = {"WeightAveraging", "StochasticWeightAveraging", "EMACallback", "EMAHook", "EMA"}


_finished: "WeakSet[Any]" = WeakSet()


def note_finished(callbacks: list[Any]) -> None:
    """Notes the averages of other libraries that were part of a task, since these do not say that they were."""
    _finished.update(other for other in callbacks if _WRITE_WEIGHTS & {cls.__name__ for cls in type(other).__mro__})


def refuse_order(callbacks: list[Any], merging: Any) -> None:
    """Checks that one callback takes tasks in, after all that change the weights at the end of a fit.

    Raises:
        ValueError: If there are two, or one of the others comes after it.
    """
    if sum(isinstance(other, type(merging)) for other in callbacks) > 1:
        raise ValueError("a Trainer must have one ContinualMerging, got two: each would take the task in.")
    for other in callbacks[callbacks.index(merging) + 1 :]:
        if isinstance(other, Published) or _WRITE_WEIGHTS & {cls.__name__ for cls in type(other).__mro__}:
            raise ValueError(
                f"{type(other).__name__} must come before ContinualMerging in `callbacks`: the vector of a task is that"
                " of the weights it publishes at the end."
            )


def refuse_reused(callbacks: list[Any]) -> None:
    """Checks that averages and savers are not those of an earlier fit, when a new task begins.

    Raises:
        ValueError: If an average has averaged weights of another fit, a ``ModelCheckpoint`` has written files of it, or
            an ``EarlyStopping`` has scores of it.
    """
    for other in callbacks:
        title = other.title if isinstance(other, Average) else type(other).__name__
        if other in _finished or (isinstance(other, Average) and other.steps):
            raise ValueError(
                f"{title} has averaged the weights of an earlier fit, which would go into the vector of this"
                f" task: give the Trainer of each task a {type(other).__name__} of its own."
            )
        if hasattr(other, "best_model_path") and (
            path := other.best_model_path or getattr(other, "last_model_path", "")
        ):
            raise ValueError(
                f"{type(other).__name__} has saved {path!r} in an earlier fit, and would compare scores with that"
                f" task's and remove its files: give the Trainer of each task a {type(other).__name__} of its own."
            )
        if hasattr(other, "wait_count") and math.isfinite(float(getattr(other, "best_score", math.inf))):
            raise ValueError(
                f"{title} has the best score of an earlier fit, {float(other.best_score):.4g}, and would stop this task"
                f" by it: give the Trainer of each task a {type(other).__name__} of its own."
            )
