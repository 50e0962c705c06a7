"""What a callback for ``transformers.Trainer`` does not work with."""

from typing import Any

from lightning_merge._averaging._second_sets import has_second_set
from lightning_merge._averaging._unwrapped import plain_optimizer


def refuse_sharding(fsdp: Any, deepspeed: Any) -> None:
    """Raises if the Trainer shards what it trains.

    Args:
        fsdp: Whether by FSDP, or with which settings.
        deepspeed: Whether by DeepSpeed, or with which settings.

    Raises:
        ValueError: If it does.
    """
    for name, wanted in (("fsdp", fsdp), ("deepspeed", deepspeed)):
        if wanted:
            raise ValueError(
                f"MergeCallback does not work with `{name}` of TrainingArguments, under which the Trainer saves and"
                " loads weights in ways of its own. Use one device or DDP; for a loop of your own with FSDP2 there"
                " is `lightning_merge.Averager`."
            )


def refuse(trainer: Any, callback: Any) -> None:
    """Raises if a training that begins is none for the callback.

    Raises:
        ValueError: If there are two of them, or weights are sharded or have a second set.
    """
    ours = [each for each in trainer.callback_handler.callbacks if isinstance(each, type(callback))]
    if len(ours) > 1:
        raise ValueError(
            f"a Trainer must have one MergeCallback, got {len(ours)}: both would put their weights into the model,"
            " and evaluate and save each other's."
        )
    refuse_sharding(getattr(trainer, "is_fsdp_enabled", False), getattr(trainer, "is_deepspeed_enabled", False))
    optimizer = plain_optimizer(trainer.optimizer)
    if has_second_set(optimizer):
        raise ValueError(
            f"MergeCallback does not work with {type(optimizer).__name__}, which has weights of its own for evaluation:"
            " the Trainer has it write them into the model around each evaluation. Use another `optim`, or train"
            " without the callback."
        )
