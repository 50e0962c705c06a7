"""ASWA: adaptive stochastic weight averaging, a mean that validation guards."""

import math
from typing import Unpack

from lightning.pytorch import LightningModule, Trainer

from lightning_merge import weights
from lightning_merge._averaging._elsewhere import Taken
from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._checks import start, whole
from lightning_merge._choice import Mode, mode_of, standing
from lightning_merge.callbacks._accept_if_better import logged, refuse_other_mode, refuse_without_validation
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import GatedMean
from lightning_merge.schedules import EveryNEpochs
from lightning_merge.selections import Selection, chosen
from lightning_merge.weights import Weights


class ASWA(WeightMerging):
    """Adaptive stochastic weight averaging: the weights of an epoch's end join the mean if that is no worse.

    At the end of each epoch the mean that would result is measured by a validation run of its own, which leaves nothing
    in the logs: it doubles the cost of validation. If it is rejected nothing has been written. The score it decides by
    flatters: report results on other data.

    Args:
        monitor: The metric that decides, under its plain name.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is. It can be left out where the last word of the name
            says it, as ``val/loss`` or ``val/acc``.
        start_epoch: Completed epochs at which the first weights are taken in: an int of at least 0, or a float in
            [0, 1) as a share of the run.
        every_n_epochs: Epochs between offers; at least 1.
        hard: Also measures the weights of the epoch alone, which become the mean if they are better than both.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        selection: Which tensors are averaged; by default all parameters. BatchNorm statistics are by default measured
            again under each candidate, on the last training batches.
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Attributes:
        score: The score of the mean; ``None`` before there is one.

    Raises:
        ValueError: If an argument is out of its range; at fit start if there is no validation loader; at the first
            offer if validation does not log ``monitor``.

    Example:
        >>> ASWA(monitor="val/acc", mode="max").name
        'aswa'

    References:
        Demir et al., "Adaptive stochastic weight averaging", 2024, algorithm 1.
    """

    def __init__(
        self,
        monitor: str,
        mode: Mode | None = None,
        start_epoch: int | float = 0.5,
        every_n_epochs: int = 1,
        hard: bool = False,
        validate: Validate = "merged",
        name: str = "aswa",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        monitor = checked_monitor("monitor", monitor)
        refuse_other_mode(mode)
        every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        start_epoch = start("start_epoch", start_epoch)
        super().__init__(
            GatedMean(hard),
            schedule=EveryNEpochs(every_n_epochs, start=start_epoch),
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            **known(options, RuleOptions, self),
        )
        self.decides_by = monitor
        self.mode = mode_of(type(self).__name__, monitor, mode)

    @property
    def score(self) -> float | None:
        """The score of the mean; ``None`` before there is one."""
        if self._state is None or not self.ready:
            return None
        found = float(self._state["score"])
        return found if self.mode == "max" else -found

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run without validation."""
        refuse_without_validation(self.title, trainer)
        super().on_fit_start(trainer, pl_module)

    def _update(self, taken: Taken) -> bool:
        """Offers the weights to the mean."""
        rule = self._active_rule
        assert isinstance(rule, GatedMean)
        return rule.offer(self._kept, taken.averaged, self._score)

    def _score(self, candidate: Weights) -> float:
        """The score of weights in the place of the mean, higher is better."""
        fitted = weights.like({**candidate, **weights.copies(self._tensors.live_copied)}, self.tensors)
        fitted |= weights.like(self.statistics(fitted), self.tensors)
        validation = self._session.validation
        found, monitor = validation.probe(self, fitted), str(self.decides_by)
        if monitor not in found and validation.knows(monitor):
            validation.say_left_out(monitor)
            return standing(math.nan)
        return standing(logged(self.title, monitor, found), self.mode)
