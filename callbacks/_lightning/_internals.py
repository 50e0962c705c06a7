"""Private parts of Lightning under names of their own."""

from typing import Any


def dump_checkpoint(trainer: Any, weights_only: bool) -> dict[str, Any]:
    """The checkpoint that ``trainer.save_checkpoint`` would write."""
    checkpoint: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only)
    return checkpoint


def accumulates(trainer: Any) -> bool:
    """Whether the gradient of the current batch is kept for a later step of the optimizer."""
    return bool(trainer.fit_loop._should_accumulate())


def synchronise_within(strategy: Any, group: Any) -> None:
    """Makes a DDP strategy synchronise gradients within a group of processes, instead of all of them."""
    strategy._ddp_kwargs["process_group"] = group


def has_trainer(module: Any) -> bool:
    """Whether a LightningModule is attached to a Trainer; its ``trainer`` raises if it is not."""
    return module._trainer is not None
