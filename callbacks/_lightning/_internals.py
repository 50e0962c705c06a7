"""Private parts of Lightning under names of their own."""

from typing import Any


def dump_checkpoint(trainer: Any, weights_only: bool) -> dict[str, Any]:
    """The checkpoint that ``trainer.save_checkpoint`` would write."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    return checkpoint


def accumulates(trainer: Any) -> bool:
    """Whether the gradient of the current batch is kept for a later step of the optimizer."""
    return bool(trainer.fit_loop._should_accumulate())


def ends_epoch(trainer: Any) -> bool:
    """Whether this batch is the last of its epoch, also of one that ``trainer.should_stop`` cuts short.

    Lightning validates after either, and a point of the epoch's end that is taken later would not be measured.
    """
    return bool(trainer.is_last_batch or (trainer.should_stop and trainer.fit_loop._can_stop_early))


def source_of_loaders(trainer: Any) -> Any:
    """What a fit asks for its loaders, by ``dataloader()``."""
    return trainer.fit_loop._data_source


def combined_loader(trainer: Any) -> Any:
    """The ``CombinedLoader`` of a fit, once it has one."""
    return trainer.fit_loop._combined_loader


def mode_of(loader: Any) -> str:
    """What a ``CombinedLoader`` does where its loaders differ in length."""
    return str(loader._mode)


def log_for(trainer: Any, batch: Any) -> None:
    """What is logged from here on is of this batch, which has its size."""
    if (results := trainer._results) is not None:
        results.batch, results.batch_size = batch, None


def synchronise_within(strategy: Any, group: Any) -> None:
    """Makes a DDP strategy synchronise gradients within a group of processes, instead of all of them."""
    strategy._ddp_kwargs["process_group"] = group


def has_trainer(module: Any) -> bool:
    """Whether a LightningModule is attached to a Trainer; its ``trainer`` raises if it is not."""
    return module._trainer is not None


SAVE = "_save_checkpoint"
"""The method by which a ``ModelCheckpoint`` writes a file."""


def monitoring_savers(trainer: Any) -> list[Any]:
    """The callbacks that write files by a metric, or could."""
    return [callback for callback in trainer.callbacks if hasattr(callback, "monitor") and hasattr(callback, SAVE)]


def checkpoint_connector(trainer: Any) -> Any:
    """What makes the content of a checkpoint for the Trainer."""
    return trainer._checkpoint_connector


def loaders_of(loop: Any) -> list[Any]:
    """The loaders of a loop, as far as they are set up."""
    return list(getattr(loop._combined_loader, "flattened", ()))


def is_compiled_whole(module: Any) -> bool:
    """Whether ``torch.compile`` was applied to a LightningModule, which Lightning unwraps again."""
    return getattr(module, "_compiler_ctx", None) is not None


def launcher_of(trainer: Any) -> Any:
    """What starts processes for a fit alone and brings results of it back (fork, spawn); else ``None``."""
    launcher = trainer.strategy.launcher
    return launcher if hasattr(launcher, "get_extra_results") else None


def starts_afresh(launcher: Any) -> bool:
    """Whether its processes get pickled copies of everything, instead of being forked."""
    return bool(launcher._start_method != "fork")
