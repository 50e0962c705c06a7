"""What a callback asks of the running Trainer: how long it will run, and where its loader is."""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities.seed import isolate_rng

from lightning_merge.schedules import RunLength


def planned_epochs(trainer: Any) -> int | None:
    """Epochs of the run if ``max_epochs`` says so."""
    epochs = trainer.fit_loop.max_epochs
    return None if epochs is None or epochs < 0 else epochs


def planned_length(trainer: Any) -> RunLength:
    """The length of the run as far as it is known; looks at the training loader.

    Steps are those of one optimizer, as averages count them: unknown where the module takes them itself.
    """
    epochs = planned_epochs(trainer)
    module = trainer.lightning_module
    if not module.automatic_optimization:
        if len(trainer.optimizers) == 1 and trainer.max_steps >= 0 and epochs is None:
            return RunLength(steps=trainer.max_steps)  # which Lightning counts on the optimizers
        reason = f"{type(module).__name__} steps its optimizers itself (manual optimization), so nobody knows how often"
        return RunLength(epochs=epochs, unknown_since=reason)
    trainer.fit_loop.setup_data()
    batches = trainer.num_training_batches
    stages = _accumulation(trainer, batches) if math.isfinite(batches) else []
    bounds = []
    if epochs is not None and stages:
        bounds.append(_steps_within(stages, epochs))
    if trainer.max_steps >= 0:
        bounds.append(trainer.max_steps)
    steps = min(bounds, default=None)
    if epochs is None and steps is not None and stages:
        epochs = _epochs_for(stages, steps)
    if len({per_epoch for _, per_epoch in stages}) == 1:
        return RunLength(steps=steps, epochs=epochs, steps_per_epoch=stages[0][1])
    reason = "GradientAccumulationScheduler changes how many steps an epoch has" if stages else ""
    return RunLength(steps=steps, epochs=epochs, unknown_since=reason)


def _accumulation(trainer: Any, batches: int) -> list[tuple[int, int]]:
    """Epochs from which on an epoch has so many optimizer steps, the first being 0."""
    schedulers = [each for each in trainer.callbacks if isinstance(each, GradientAccumulationScheduler)]
    changes = schedulers[0].scheduling if schedulers else {0: trainer.accumulate_grad_batches}
    return [(epoch, math.ceil(batches / changes[epoch])) for epoch in sorted(changes)]


def _steps_within(stages: list[tuple[int, int]], epochs: int) -> int:
    """Steps of so many epochs."""
    ends = [*(start for start, _ in stages[1:]), epochs]
    return sum(max(0, min(end, epochs) - start) * each for (start, each), end in zip(stages, ends, strict=True))


def _epochs_for(stages: list[tuple[int, int]], steps: int) -> int:
    """Epochs that so many steps take."""
    for (start, each), (end, _) in pairwise(stages):
        if steps <= (end - start) * each:
            return start + math.ceil(steps / each)
        steps -= (end - start) * each
    start, each = stages[-1]
    return start + (math.ceil(steps / each) if each else 0)


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
        run = replace(run, steps=steps, steps_per_epoch=per_epoch)
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
