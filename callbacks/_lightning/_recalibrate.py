"""BatchNorm statistics of the live weights, measured by the module's own step on kept batches."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from lightning.pytorch import LightningModule
from tqdm import tqdm  # type: ignore[import-untyped]

from lightning_merge._ranks import gathered
from lightning_merge.calibration import batch_norm_layers, recalibrated_statistics
from lightning_merge.callbacks._lightning._batch_copies import BatchCopy
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._user_step import (
    WAYS,
    Way,
    calibration,
    first_way_that_runs,
    has_calibration_step,
    names_in_eval,
    outside_training,
    running,
    takes_iterator,
    why_not_alone,
)
from lightning_merge.weights import Weights


def prepare(trainer: Any, module: LightningModule, title: str, recent: RecentBatches) -> None:
    """Refuses a step that cannot be run outside training, or has it tried with the first batch that is trained on.

    Raises:
        ValueError: If ``training_step`` steps optimizers or fetches its batches itself, and nothing takes its place.
    """
    own = has_calibration_step(module)
    reason = why_not_alone(module)
    if reason and not own:
        raise ValueError(
            f"{title} measures BatchNorm statistics again (`buffers='recompute'`) by `training_step`, which"
            f" {reason}. Define `calibration_step(self, batch)` on"
            f" {type(module).__name__}, which runs the forward pass, or choose another `buffers`."
        )
    if takes_iterator(module):
        recent.fetched = lambda: trainer.fit_loop._data_fetcher._batch
    recent.trial = partial(_try, trainer, module, title, recent)


def recalibrate(trainer: Any, module: LightningModule, name: str, recent: RecentBatches) -> Weights:
    """BatchNorm statistics of the live weights, measured on the kept batches; training notices nothing of it.

    Args:
        trainer: The Trainer.
        module: The module, with the weights in place.
        name: What a progress bar calls it.
        recent: The batches.

    Raises:
        ValueError: If the module's step does not run outside training.
    """
    bar = trainer.progress_bar_callback
    # As many in every process: a sharded module, or SyncBatchNorm, communicates in each forward pass.
    copies = recent.on(trainer.strategy.root_device, min(gathered(len(recent.batches))))
    if recent.way is None and copies:
        recent.way = _way(trainer, module, name, recent, copies[-1])
    shown = tqdm(
        copies,
        desc=f"{name}: measuring BatchNorm statistics",
        unit="batch",
        leave=False,
        delay=1.0,  # seconds: what is done at once needs no bar
        disable=bar is None or not bar.is_enabled or _is_rich(bar),
    )
    try:
        return _statistics(trainer, module, recent, shown, recent.way)
    except Exception as error:
        error.add_note(
            f"{name} was measuring BatchNorm statistics under merged weights. If this step cannot run outside training,"
            f" define `calibration_step(self, batch)` on {type(module).__name__}."
        )
        raise


def _is_rich(bar: Any) -> bool:
    """Whether a bar is one of rich, of either Lightning: it redraws the lines that another bar writes on."""
    return any(kind.__name__ == "RichProgressBar" for kind in type(bar).__mro__)


def _try(trainer: Any, module: LightningModule, title: str, recent: RecentBatches, held: BatchCopy) -> None:
    device = trainer.strategy.root_device
    recent.way = _way(trainer, module, title, recent, lambda: held.on(device))


def _way(trainer: Any, module: LightningModule, title: str, recent: RecentBatches, copy: Callable[[], Any]) -> Way:
    if not batch_norm_layers(module):
        return WAYS[0]  # all are frozen at the moment
    found = first_way_that_runs(WAYS, lambda way: bool(_statistics(trainer, module, recent, [copy], way)))
    if isinstance(found, Exception):
        step = "calibration_step" if has_calibration_step(module) else "training_step"
        raise ValueError(
            f"{title} measures BatchNorm statistics again (`buffers='recompute'`) by `{step}`, which does not run"
            f" outside training: {type(found).__name__}: {found}. Define `calibration_step(self, batch)` on"
            f" {type(module).__name__}, which runs the forward pass, or choose another `buffers`."
        ) from found
    return found


def _statistics(
    trainer: Any, module: LightningModule, recent: RecentBatches, copies: Iterable[Callable[[], Any]], way: Way
) -> Weights:
    def forward(copy: Callable[[], Any]) -> None:
        with running(trainer, module, way, recent.in_eval or frozenset()):
            calibration(module, copy())

    if module.training:
        recent.in_eval = names_in_eval(module)
    with outside_training(trainer, module):
        if recent.in_eval is not None:  # one tells frozen layers by it, also where validation calls for statistics
            for name, each in module.named_modules():
                each.training = name not in recent.in_eval
        return recalibrated_statistics(module, copies, forward)
