"""Whether a training resumes bit for bit: the run, the run again from a file, and the first difference."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from lightning_merge._checks import function, instance, whole
from lightning_merge._checks import path as checked_path
from lightning_merge.callbacks._replay_run._compare import Difference, first_difference
from lightning_merge.callbacks._replay_run._recorder import Recorder


@final
@dataclass(frozen=True)
class Replayed:
    """What ``replay`` found.

    Args:
        compared: Points at which the two runs were compared: before and after every batch that was trained twice.
        difference: The first one; ``None`` if there is none.
    """

    compared: int
    difference: Difference | None

    def __str__(self) -> str:
        if self.difference is None:
            return f"resumes bit for bit: {self.compared} points before and after batches are the same."
        return f"does not resume bit for bit: {self.difference}"


def replay(
    make: Callable[[], tuple[Any, ...]], folder: str | Path, *, epoch: int = 0, batch: int | None = None
) -> Replayed:
    """Trains to the end, trains again from a file of the way, and compares all that a run goes on from.

    Compared before and after every batch: the batch, weights, buffers, public numbers and tensors on the module,
    optimizer states, learning-rate schedules, averages, and the random states of torch, numpy and Python.

    Args:
        make: Seeds, and makes everything anew, as a new process would: a Trainer, a module and, if it has none of its
            own, data: a data module, or a training loader and, behind it, one for validation. Called twice.
        folder: Where the file is written.
        epoch: The epoch after which it is written, counted from 0; not the last one.
        batch: The batch of that epoch after which it is written, counted from 0; ``None``: at the epoch's end.

    Raises:
        TypeError: If an argument is of the wrong type, or ``make`` gives something else.
        ValueError: If ``epoch`` or ``batch`` is less than 0, the run never came there or ended there, or ``make`` gives
            the same objects again.

    Example:
        >>> from functools import partial
        >>> partial(replay, folder="checks", epoch=1).keywords["epoch"]
        1
    """
    function("make", make)
    epoch = whole("epoch", epoch, 0)
    batch = None if batch is None else whole("batch", batch, 0)
    path = Path(checked_path("folder", folder)) / "replay.ckpt"
    path.unlink(missing_ok=True)
    made = _made(make)
    points = record(made, Recorder(path, epoch, batch)).points
    if not path.is_file():
        where = f"the end of epoch {epoch}" if batch is None else f"batch {batch} of epoch {epoch}"
        raise ValueError(f"the run never came to {where}: it ended {list(points)[-1] if points else 'at once'}.")
    again = _made(make)
    if same := next((type(one).__name__ for one in again for other in made if one is other is not None), None):
        raise ValueError(
            f"`make` must make everything anew, as a new process would, got the same {same} twice: what it remembers of"
            " the first run would hide that no file has it."
        )
    return compared(points, record(again, Recorder(), path).points)


def compared(points: dict[str, dict[str, str]], resumed: dict[str, dict[str, str]]) -> Replayed:
    """The result of two recordings."""
    return Replayed(len(resumed), first_difference(points, resumed))


def _made(make: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """What ``make`` gives.

    Raises:
        TypeError: If it is something else than it should be.
    """
    made = make()
    says = "a function that gives Trainer, module and, where there is any, data"
    instance("make", made, tuple, says)
    if not 2 <= len(made) <= 4:
        raise TypeError(
            "`make` must give Trainer, module and at most two things for data, a loader to train and one to validate,"
            f" got {len(made)} things."
        )
    if not callable(getattr(made[0], "fit", None)):
        raise TypeError(f"`make` must be {says}, in this order, got {type(made[0]).__name__} first.")
    return made


def record(made: tuple[Any, ...], recorder: Recorder, path: Path | None = None) -> Recorder:
    """Trains what ``make`` gives, from a file if there is one."""
    trainer, module, *data = made
    trainer.callbacks.append(recorder)
    # Files of a training hold more than tensors where others put it there; this one was written a moment ago.
    trainer.fit(module, *data, ckpt_path=path, weights_only=None if path is None else False)
    return recorder
