"""SMA: the mean of every step from an early one on, and of those means the best."""

from typing import Unpack

from lightning.pytorch import LightningModule, Trainer

from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._checks import start
from lightning_merge._choice import Mode, mode_of
from lightning_merge.callbacks._accept_if_better import refuse_other_mode, refuse_without_validation
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import SelectedMean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection, chosen


class SMA(WeightMerging):
    """Simple moving average: the mean of the weights of every step since ``start_step``, chosen by its own metric.

    Each validation measures the mean, and the one that did best is what is published at the end.

    Args:
        monitor: The metric of the mean that chooses, without a prefix.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is. It can be left out where the last word of the name
            says it, as ``val/loss`` or ``val/acc``.
        start_step: Applied step whose weights are the first of the mean: at least 0, or a share of the run in [0, 1).
        validate: ``"merged"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        selection: Which tensors are averaged; by default all parameters. BatchNorm statistics are by default measured
            again under the mean (the authors average them along).
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of its range; at fit start if there is no validation loader; at the first
            validation of the mean if it does not log ``monitor``.

    Example:
        >>> SMA(monitor="val/loss").name
        'sma'

    References:
        Arpit et al., "Ensemble of averages: improving model selection and boosting performance in domain
        generalization", NeurIPS 2022, section 3. Start at step 99, so that step 100 is the first that is averaged.
    """

    def __init__(
        self,
        monitor: str,
        mode: Mode | None = None,
        start_step: int | float = 99,
        validate: Validate = "merged",
        name: str = "sma",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        monitor = checked_monitor("monitor", monitor)
        refuse_other_mode(mode)
        start_step = start("start_step", start_step)
        if isinstance(validate, str) and validate == "raw":
            raise ValueError(
                "`validate` must be 'merged' or 'both' for SMA, which is chosen by how it does, got 'raw'."
            )
        super().__init__(
            SelectedMean(),
            schedule=EveryNSteps(1, start=start_step),
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            monitor=monitor,
            mode=mode_of(type(self).__name__, monitor, mode),
            **known(options, RuleOptions, self),
        )

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the merged weights do, also when the best takes the place of the last."""
        return self.updates, int(self._state is not None and self._state["concluded"])

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run without validation."""
        refuse_without_validation(self.title, trainer)
        super().on_fit_start(trainer, pl_module)
