"""What a callback asks of the running Trainer: how long it will run, and where its loader is."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.seed import isolate_rng

from lightning_merge.schedules import RunLength


def planned_epochs(trainer: Any) -> int | None:
    """Epochs of the run if ``max_epochs`` says so."""
    epochs = trainer.fit_loop.max_epochs
    return None if epochs is None or epochs < 0 else epochs


def planned_length(trainer: Any) -> RunLength:
    """The length of the run as far as it is known; looks at the training loader."""
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    per_epoch = None if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
    epochs = planned_epochs(trainer)
    bounds = []
    if epochs is not None and per_epoch is not None:
        bounds.append(epochs * per_epoch)
    if trainer.max_steps >= 0:
        # Lightning's `max_steps` counts the steps of all optimizers.
        bounds.append(trainer.max_steps // max(1, len(trainer.optimizers)))
    steps = min(bounds, default=None)
    if epochs is None and steps is not None and per_epoch:
        epochs = math.ceil(steps / per_epoch)
    return RunLength(steps=steps, epochs=epochs, steps_per_epoch=per_epoch)


def resolved(trainer: Any, things: Sequence[Any], steps_per: int = 1) -> list[Any]:
    """Rules and schedules with shares of the run and epochs turned into steps.

    The training loader is only looked at if that takes it.

    Args:
        trainer: A Trainer.
        things: What has a ``resolve``.
        steps_per: Batches that make what they count as one step.
    """
    run = RunLength(epochs=planned_epochs(trainer))
    try:
        return [thing.resolve(run) for thing in things]
    except ValueError:
        run = planned_length(trainer)
        steps, per_epoch = (None if n is None else n // steps_per for n in (run.steps, run.steps_per_epoch))
        run = RunLength(steps=steps, epochs=run.epochs, steps_per_epoch=per_epoch)
        return [thing.resolve(run) for thing in things]


def restore_loader_position(trainer: Any) -> None:
    """Sets a resumed training loader to where it was, if it was set up for ``planned_length``.

    Lightning does so when it sets the loader up, which was before the position had been read from the checkpoint.
    """
    loop = trainer.fit_loop
    if loop.restarting and loop._combined_loader_states_to_load:
        loop._load_combined_loader_states()
        with isolate_rng():  # a new iterator draws a seed, and the random state may have been restored already
            iter(loop._data_fetcher)
