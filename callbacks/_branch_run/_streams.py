"""A loader for each branch: what the Trainer is given is checked, and every batch of it is taken apart."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.utilities import CombinedLoader

from lightning_merge.callbacks._branch_run._settings import Settings
from lightning_merge.callbacks._branch_strategy import BranchStrategy
from lightning_merge.callbacks._lightning._internals import combined_loader, mode_of, source_of_loaders
from lightning_merge.callbacks._publication._session import Publisher

_LOADERS = "a list or a dict of {} loaders, one for each branch, or Lightning's `CombinedLoader` of one"


def watch_loaders(settings: Settings, trainer: Any, module: LightningModule, stage: str) -> None:
    """Checks the training loaders whenever the Trainer asks for them, if each branch has its own.

    That is before Lightning has made a ``CombinedLoader`` of a list, so that a mode that was chosen is known from one
    that was not.

    Args:
        settings: Say how many there are.
        trainer: A Trainer.
        module: Its module.
        stage: What it does; loaders are those of a fit.
    """
    if settings.batches != "own" or stage != "fit":
        return
    title = settings.title

    def checked(original: Callable[[], Any]) -> Any:
        given = original()
        loaders, mode = _taken(given, title, settings.branches)
        lengths = [sized_len(loader) for loader in loaders]
        uneven = len(set(lengths)) > 1 or None in lengths
        if uneven and mode is None:
            raise ValueError(
                f"{title}: the loaders of the branches have {_listed(lengths)} batches. Say what an epoch is:"
                " `CombinedLoader(loaders, mode)` of Lightning with 'min_size' (the shortest ends it), 'max_size_cycle'"
                " (shorter ones begin anew) or 'max_size' (branches whose loader is through wait)."
            )
        if uneven and mode == "max_size":
            _refuse_waiting(trainer, title)
        return given

    Publisher.attach(trainer, module).patches.replace(source_of_loaders(trainer), "dataloader", checked)


def _taken(given: Any, title: str, branches: int) -> tuple[list[Any], str | None]:
    """The loaders, and how they are combined if that was said."""
    is_stated = isinstance(given, CombinedLoader)
    loaders = given.iterables if is_stated else given
    mode = mode_of(given) if is_stated else None
    found = list(loaders.values()) if isinstance(loaders, Mapping) else loaders
    if not isinstance(found, list | tuple):
        says = _LOADERS.format(branches)
        raise TypeError(f"`batches='own'` of {title} needs {says}, got {type(given).__name__}.")
    if len(found) != branches or any(isinstance(each, list | tuple | Mapping) for each in found):
        says = _LOADERS.format(branches)
        raise ValueError(f"`batches='own'` of {title} needs {says}, got {len(found)} of {_kinds(found)}.")
    return list(found), mode


def _kinds(found: Sequence[Any]) -> str:
    return ", ".join(dict.fromkeys(type(each).__name__ for each in found)) or "nothing"


def _listed(lengths: Sequence[int | None]) -> str:
    return ", ".join("an unknown number of" if n is None else str(n) for n in lengths)


def _refuse_waiting(trainer: Any, title: str) -> None:
    instead = "Use 'min_size' or 'max_size_cycle'"
    if isinstance(trainer.strategy, BranchStrategy):
        raise ValueError(
            f"{title}: a process whose loader is through would wait without a step under mode 'max_size', and what"
            f" processes do at a step together would never end. {instead}, or train the branches in turn."
        )
    changes = any(isinstance(each, GradientAccumulationScheduler) for each in trainer.callbacks)
    if changes or trainer.accumulate_grad_batches > 1:
        raise ValueError(
            f"{title}: a branch whose loader is through under mode 'max_size' would lose the gradients that it has"
            f" accumulated. {instead}, or do not accumulate."
        )


def parts(trainer: Any, batch: Any, branches: int, title: str) -> list[Any]:
    """What of a batch is for each branch; ``None`` for one whose loader is through.

    Raises:
        TypeError: If there is not one part for each, as after a hook of the module that has put them together.
    """
    found = list(batch.values()) if isinstance(batch, Mapping) else batch
    if not isinstance(found, list | tuple) or len(found) != branches:
        raise TypeError(
            f"`batches='own'` of {title} needs batches of {branches} parts, as `CombinedLoader` makes them, got"
            f" {type(batch).__name__}. Leave them apart in `on_before_batch_transfer` and the like."
        )
    combined = combined_loader(trainer)
    if mode_of(combined) != "max_size":
        return list(found)
    # A loader that was through when a file was written does not know that after a resume, and begins anew.
    number, lengths = trainer.fit_loop.epoch_loop.batch_idx, map(sized_len, combined.flattened)
    return [part if n is None or number < n else None for part, n in zip(found, lengths, strict=True)]
