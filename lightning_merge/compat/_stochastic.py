"""Lightning's ``StochasticWeightAveraging`` by its own name and arguments, done by this library's ``SWA``."""

from typing import Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._checks import one_of, whole
from lightning_merge._checks import real as checked_real
from lightning_merge.callbacks._swa import SWA, checked_rates
from lightning_merge.compat._custom_mean import AvgFn, CustomMean, check_functions
from lightning_merge.compat._device import checked_device
from lightning_merge.schedules import EveryNEpochs


class StochasticWeightAveraging(SWA):
    """Lightning's ``StochasticWeightAveraging``: the mean over the epochs of a tail at rate ``swa_lrs``.

    Args:
        swa_lrs: Learning rate of the tail, more than 0; a list has one for each parameter group.
        swa_epoch_start: The tail begins with the n-th epoch (an int of at least 1, counted from 1), or with epoch
            ``int(share * max_epochs)`` (a float in [0, 1]).
        annealing_epochs: Epochs over which the rate moves to ``swa_lrs``.
        annealing_strategy: ``"cos"`` or ``"linear"``.
        avg_fn: ``average, weights, number averaged so far -> new average``, per tensor, instead of the uniform mean.
        device: Where Lightning's keeps its average. Here it lives beside the model, whatever this says; one line at
            fit start tells it where the model is elsewhere.
        name: Of the average, as in ``WeightMerging``.

    Raises:
        ValueError: If an argument is out of its range, or at fit start if a share is asked of a run without
            ``max_epochs`` or the lists do not match the optimizer.

    Example:
        >>> StochasticWeightAveraging(swa_lrs=0.01).swa_lr
        0.01
    """

    def __init__(
        self,
        swa_lrs: float | list[float],
        swa_epoch_start: int | float = 0.8,
        annealing_epochs: int = 10,
        annealing_strategy: Literal["cos", "linear"] = "cos",
        avg_fn: AvgFn | None = None,
        device: torch.device | str | int | None = "cpu",
        name: str = "swa",
    ) -> None:
        check_functions(avg_fn=avg_fn)
        says = "a whole number of at least 1 or a share in [0, 1]"
        swa_epoch_start = checked_real("swa_epoch_start", swa_epoch_start, says)
        if isinstance(swa_epoch_start, int) and swa_epoch_start < 1:
            raise ValueError(f"`swa_epoch_start` must be at least 1 as a whole number, got {swa_epoch_start}.")
        if not 0 <= swa_epoch_start <= 1 and isinstance(swa_epoch_start, float):
            raise ValueError(f"`swa_epoch_start` must be in [0, 1] as a share, got {swa_epoch_start}.")
        super().__init__(
            swa_lr=checked_rates("swa_lrs", swa_lrs),
            anneal_epochs=whole("annealing_epochs", annealing_epochs, 0),
            anneal_strategy=one_of("annealing_strategy", annealing_strategy, ("cos", "linear")),
            name=name,
        )
        self.swa_epoch_start = swa_epoch_start
        self.device = checked_device(device)
        if avg_fn is not None:
            self.rule = self._active_rule = CustomMean(avg_fn)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Turns the epoch that Lightning counts from 1, or rounds down from a share, into completed epochs."""
        if stage == "fit":
            start = self.swa_epoch_start
            if isinstance(start, float):
                if not trainer.max_epochs or trainer.max_epochs < 0:
                    raise ValueError(
                        f"`swa_epoch_start={start}` is a share of the run, but the Trainer has no `max_epochs`."
                    )
                start = int(start * trainer.max_epochs)
            self.schedule = EveryNEpochs(1, start=max(start - 1, 0))
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says it if the average is kept elsewhere than was asked."""
        if self.device is not None and torch.device(self.device).type != pl_module.device.type:
            rank_zero_info(f"{self.title}: the average is kept on {pl_module.device}, beside the model.")
        super().on_fit_start(trainer, pl_module)
