"""The Trainer that a callback is in, of which callbacks are told nothing, and what is put around its methods."""

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from types import FrameType
from typing import Any, NamedTuple

from lightning_merge.schedules import RunLength

_LOOP = "_inner_training_loop"


class Running(NamedTuple):
    """A training that is under way.

    Args:
        trainer: What trains.
        resumed_from: The folder of the checkpoint that it goes on from.
        length: How long it will be.
    """

    trainer: Any
    resumed_from: str | None
    length: RunLength


def running(callback: Any) -> Running:
    """The training that has just begun and told the callback so.

    Raises:
        RuntimeError: If no Trainer has.
    """
    frame: FrameType | None = sys._getframe(1)
    # Callbacks are handed the model and the optimizer, but neither the Trainer, whose `evaluate` and `save_model` must
    # see merged weights, nor the folder that it resumes from: both are variables of the loop that called.
    while frame is not None and not _is_loop_of(frame, callback):
        frame = frame.f_back
    if frame is None:
        raise RuntimeError(
            f"{type(callback).__name__} must be a callback of a transformers.Trainer that trains, as in"
            f" Trainer(..., callbacks=[{type(callback).__name__}(...)]); no `{_LOOP}` has called it."
        )
    trainer, found = frame.f_locals["self"], frame.f_locals
    epochs = trainer.state.num_train_epochs
    length = RunLength(
        steps=trainer.state.max_steps,
        epochs=epochs if epochs < sys.maxsize else None,  # which stands for a loader of unknown length
        steps_per_epoch=found.get("num_update_steps_per_epoch"),
    )
    return Running(trainer, found.get("resume_from_checkpoint"), length)


def _is_loop_of(frame: FrameType, callback: Any) -> bool:
    if frame.f_code.co_name != _LOOP:
        return False
    handler = getattr(frame.f_locals.get("self"), "callback_handler", None)
    return any(each is callback for each in getattr(handler, "callbacks", ()))


def surround(trainer: Any, method: str, around: Callable[..., AbstractContextManager[None]]) -> Callable[[], None]:
    """Puts a context around each call of a method of this Trainer.

    Args:
        trainer: Whose.
        method: Its name.
        around: Gets the arguments of the call.

    Returns:
        What takes it away again.
    """
    original, own = getattr(trainer, method), vars(trainer)
    was_replaced, is_over = method in own, False

    @wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with nullcontext() if is_over else around(*args, **kwargs):
            return original(*args, **kwargs)

    own[method] = wrapped

    def undo() -> None:
        nonlocal is_over
        is_over = True
        if own.get(method) is not wrapped:
            return  # somebody else has put something around it since, and calls it
        if was_replaced:
            own[method] = original
        else:
            del own[method]

    return undo
