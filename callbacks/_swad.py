"""SWAD: stochastic weight averaging densely, over a valley of the validation loss."""

from typing import Literal, Unpack

from lightning_merge._checks import flag
from lightning_merge._checks import monitor as checked_monitor
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import ValleyMean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection, chosen


class SWAD(WeightMerging):
    """Stochastic weight averaging densely: the mean of every step between the minimum of a loss and its rise.

    It decides on how the raw weights do, so validation measures those under the plain metric names, also for the other
    averages of the Trainer, which then log ``<name>/...``. Validate often: every 1 or 2 % of the run.

    Args:
        monitor: The metric it decides on, lower is better: a validation loss.
        n_converge: Evaluations within which the first has the lowest score; at least 1.
        n_tolerance: Evaluations in a row above the threshold that end the valley; at least 1.
        tolerance: How far above the mean score of convergence is still low, as a share of it; at least 0.
        preset: ``"intended"``, ``"paper"`` or ``"official"``, see ``ValleyMean``.
        stop: Stop training once the valley is over, since nothing more can change the mean.
        validate: ``"raw"``, or ``"both"`` to measure the mean as ``<name>/...`` too.
        name: Prefix of its metrics, and of its files.
        selection: Which tensors are averaged and what happens to buffers; by default all parameters, and BatchNorm
            statistics are measured again under the merged weights.
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of its range, or at the first validation if it does not log ``monitor``.

    Example:
        >>> SWAD(monitor="val/loss").name
        'swad'

    References:
        Cha et al., "SWAD: Domain generalization by seeking flat minima", NeurIPS 2021, algorithm 1.
    """

    def __init__(
        self,
        monitor: str,
        n_converge: int = 3,
        n_tolerance: int = 6,
        tolerance: float = 0.3,
        preset: Literal["intended", "paper", "official"] = "intended",
        stop: bool = True,
        validate: Validate = "raw",
        name: str = "swad",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        super().__init__(
            ValleyMean(n_converge, n_tolerance, tolerance, preset),
            schedule=EveryNSteps(),
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            monitor=checked_monitor("monitor", monitor),
            stop_when_finished=flag("stop", stop),
            **known(options, RuleOptions, self),
        )
