"""SWA: stochastic weight averaging, the uniform mean of the weights at the ends of the last epochs."""

from collections.abc import Sequence
from typing import Any, Literal, Unpack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._checks import number, numbers, one_of, start, whole
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNEpochs, anneal
from lightning_merge.selections import Selection, chosen


class SWA(WeightMerging):
    """Stochastic weight averaging: ``mean <- mean + (weights - mean) / n`` at the end of every c-th epoch of the tail.

    The last epoch is part of the mean, an early stop still delivers it, and no epoch or optimizer step is added.

    Args:
        start_epoch: Completed epochs at which the first weights are collected: an int of at least 0, or a float in
            [0, 1) as a share of the run. Default 0.75.
        every_n_epochs: Epochs between collections; at least 1. The length of the cycle under a cyclic schedule.
        swa_lr: Learning rate of the tail, more than 0; a list has one for each parameter group. ``None`` leaves the
            learning rate to the module. If the module has a scheduler, it keeps stepping but no longer sets the rate in
            the tail; one line says so.
        anneal_epochs: Epochs of the tail over which the rate moves to ``swa_lr``; at least 0 (0 and 1: at once).
        anneal_strategy: ``"cos"`` or ``"linear"``.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        selection: Which tensors are averaged; by default all parameters. BatchNorm statistics are by default measured
            again under the merged weights, on the last training batches.
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of its range, or at fit start if a share is asked of a run of unknown length.

    Example:
        >>> SWA(start_epoch=0.75).name
        'swa'

    References:
        Izmailov et al., Averaging weights leads to wider optima and better generalization, UAI 2018, algorithm 1.
    """

    def __init__(
        self,
        start_epoch: int | float = 0.75,
        every_n_epochs: int = 1,
        swa_lr: float | Sequence[float] | None = None,
        anneal_epochs: int = 10,
        anneal_strategy: Literal["cos", "linear"] = "cos",
        validate: Validate = "merged",
        name: str = "swa",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        swa_lr = None if swa_lr is None else checked_rates("swa_lr", swa_lr)
        anneal_epochs = whole("anneal_epochs", anneal_epochs, 0)
        one_of("anneal_strategy", anneal_strategy, ("cos", "linear"))
        every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        start_epoch = start("start_epoch", start_epoch)
        super().__init__(
            Mean(),
            schedule=EveryNEpochs(every_n_epochs, start=start_epoch),
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            **known(options, RuleOptions, self),
        )
        self.swa_lr = swa_lr
        self.anneal_epochs = anneal_epochs
        self.anneal_strategy = anneal_strategy

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Sets the learning rate of the tail."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        schedule = self._active_schedule
        assert isinstance(schedule, EveryNEpochs)
        tail_epoch = trainer.current_epoch - int(schedule.start) + 1
        if self.swa_lr is None or tail_epoch < 1:
            return
        groups = trainer.optimizers[self.optimizer].param_groups
        for group, rate in zip(groups, self._rate_of_each(len(groups)), strict=True):
            # Kept in the group, the rate that the tail started from is saved and restored with the optimizer.
            if "swa_base_lr" not in group:
                group["swa_base_lr"] = float(group["lr"])
                self._announce_learning_rate(trainer, group["swa_base_lr"])
            group["lr"] = anneal(group["swa_base_lr"], rate, tail_epoch, self.anneal_epochs, self.anneal_strategy)

    def _rate_of_each(self, groups: int) -> list[float]:
        assert self.swa_lr is not None
        rates = _rates(self.swa_lr)
        if len(rates) not in (1, groups):
            raise ValueError(f"`swa_lr` must hold one rate or one for each of {groups} parameter groups, got {rates}.")
        return rates if len(rates) == groups else rates * groups

    def _announce_learning_rate(self, trainer: Trainer, base: float) -> None:
        schedulers = [type(config.scheduler).__name__ for config in trainer.lr_scheduler_configs]
        rest = f" {', '.join(schedulers)} keeps stepping but no longer sets it." if schedulers else ""
        rank_zero_info(
            f"{self.title}: the learning rate goes from {base:g} to {self.swa_lr} over {self.anneal_epochs} epochs."
            f"{rest}"
        )


def checked_rates(argument: str, given: float | Sequence[float]) -> float | Sequence[float]:
    """One learning rate, or one for each parameter group."""
    if not isinstance(given, Sequence) or isinstance(given, str):
        return number(argument, given, "(0, inf)")
    rates = list(numbers(argument, given, "(0, inf)", "more than 0, one rate or one for each parameter group"))
    if not rates:
        raise ValueError(f"`{argument}` must hold one rate or one for each parameter group, got none.")
    return rates


def _rates(swa_lr: float | Sequence[float]) -> list[float]:
    return list(swa_lr) if isinstance(swa_lr, Sequence) else [swa_lr]
