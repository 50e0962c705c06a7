"""BestK: the mean of the weights of the best validations."""

from typing import Unpack

from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._choice import Mode, mode_of
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import BestMean
from lightning_merge.schedules import AtValidations
from lightning_merge.selections import Selection, chosen


class BestK(WeightMerging):
    """The uniform mean of the weights at the ``k`` best validations.

    It decides on how the raw weights do, so validation measures those under the plain metric names, also for the other
    averages of the Trainer, which then log ``<name>/...``. Nothing is copied between validations.

    Args:
        monitor: The metric of the raw weights it decides on.
        k: Validations whose weights are averaged; at least 1. So many copies are kept.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is; by default by the metric's name, as ``val/loss``.
        validate: ``"raw"``, or ``"both"`` to measure the mean as ``<name>/...`` too.
        name: Prefix of its metrics, and of its files.
        selection: Which tensors are averaged and what happens to buffers; by default all parameters, and BatchNorm
            statistics are measured again under the merged weights.
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of its range, ``mode`` is needed, or at the first validation if it does not
            log ``monitor``.

    Example:
        >>> BestK(monitor="val/loss", k=3).name
        'best_k'
    """

    def __init__(
        self,
        monitor: str,
        k: int = 5,
        mode: Mode | None = None,
        validate: Validate = "raw",
        name: str = "best_k",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        monitor = checked_monitor("monitor", monitor)
        super().__init__(
            BestMean(k),
            schedule=AtValidations(),
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            monitor=monitor,
            mode=mode_of("BestK", monitor, mode),
            **known(options, RuleOptions, self),
        )
