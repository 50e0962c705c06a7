"""What a Trainer has logged, and runs of its validation that log elsewhere or nothing."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from typing import Any

from lightning_merge.callbacks._lightning._internals import accumulates

_KEPT = ("_progress_bar_metrics", "_callback_metrics", "_logged_metrics", "_first_loop_iter")


def validation_loop(trainer: Any) -> Any:
    """The validation loop inside of a fit."""
    return trainer.fit_loop.epoch_loop.val_loop


def batches_so_far(trainer: Any) -> int:
    """Batches that training has begun with in all."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def written_metrics(trainer: Any) -> dict[str, Any]:
    """The entries of ``callback_metrics``, without making Lightning compute what it has not computed yet."""
    found: dict[str, Any] = trainer._logger_connector._callback_metrics
    return found


def logger_connector(trainer: Any) -> Any:
    """What hands metrics to the loggers of a Trainer."""
    return trainer._logger_connector


def logs_now(trainer: Any) -> bool:
    """Whether the metrics of the batch that was just trained go to loggers."""
    automatic = trainer.lightning_module.automatic_optimization
    return bool(trainer._logger_connector.should_update_logs and not (automatic and accumulates(trainer)))


def logged_step(trainer: Any) -> int:
    """The step under which loggers get what is logged now: trained batches after which optimizers stepped."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def logged_of_loop(trainer: Any) -> dict[str, Any]:
    """What the loop that is going on has logged by ``self.log``, as loggers get it."""
    found: dict[str, Any] = trainer._logger_connector.metrics["log"]
    return found


def sent_to_loggers(trainer: Any) -> dict[str, Any]:
    """What loggers were last given under each key."""
    found: dict[str, Any] = trainer._logger_connector._logged_metrics
    return found


def is_restoring(trainer: Any) -> bool:
    """Whether the Trainer goes on from a checkpoint at this moment."""
    return bool(trainer._checkpoint_connector._loaded_checkpoint)


@contextmanager
def validating(trainer: Any) -> Iterator[None]:
    """A validation outside its turn in a fit, which training does not notice."""
    connector = trainer._logger_connector
    first = connector._first_loop_iter
    validation_loop(trainer).restarting = False  # it must not go on where a resumed file left it
    trainer.validating = True
    try:
        yield
    finally:
        trainer.training = True
        connector._first_loop_iter = first


@contextmanager
def unlogged(trainer: Any) -> Iterator[None]:
    """A validation of which no logger, no callback and no metric of the Trainer knows anything."""
    connector = trainer._logger_connector
    kept = {name: copy(getattr(connector, name)) for name in _KEPT}
    loggers, callbacks = trainer.loggers, trainer.callbacks
    trainer.loggers, trainer.callbacks = [], []
    try:
        with validating(trainer):
            yield
    finally:
        trainer.loggers, trainer.callbacks = loggers, callbacks
        for name, value in kept.items():
            setattr(connector, name, value)


@contextmanager
def logged_under(trainer: Any, prefixes: Sequence[str]) -> Iterator[None]:
    """What validation logs goes under each of the prefixes instead of its own name."""
    results = validation_loop(trainer)._results
    log = results.log

    def prefixed(fx: str, name: str, *args: Any, **kwargs: Any) -> None:
        for prefix in prefixes:
            log(fx, prefix + name, *args, **kwargs)

    results.log = prefixed
    try:
        yield
    finally:
        del results.log
