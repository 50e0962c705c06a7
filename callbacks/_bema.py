"""BEMA: a moving average without its lag behind the weights."""

from typing import Unpack

from lightning_merge._checks import start, whole
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import BiasCorrectedMean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection, chosen


class BEMA(WeightMerging):
    """Bias-corrected moving average: the average, moved on by a share of the way from the start to the last weights.

    ``average <- average + (lag + t) ** -ema_power * (weights - average)`` at step ``t`` since the start; published is
    ``average + multiplier * (lag + t) ** -bias_power * (weights - start)``. Start and average are in every full file,
    so that a run goes on bit for bit. ``teacher(self, "bema")`` has it as a reference that moves along, as for DPO.

    Args:
        ema_power: How fast the share of new weights falls, in [0, 1].
        bias_power: How fast the correction falls, at least 0.
        lag: Steps added to the time, so that the first shares are not too large; at least 0.
        multiplier: Of the correction, at least 0; with 0 it is an average with a decay that grows.
        every_n_steps: Applied optimizer steps (not batches) between updates, by which ``t`` grows; at least 1.
        start_step: It starts from the weights after this applied step (0: before training). A float in [0, 1) is a
            share of the run.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        selection: Which tensors are averaged and what happens to buffers; by default all parameters, and BatchNorm
            statistics are measured again under the merged weights (for a teacher: ``Selection(buffers="copy")``).
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of its range, or at fit start if a share is asked of a run of unknown length.

    Example:
        >>> BEMA(ema_power=0.2).name
        'bema'

    References:
        Block and Zhang, "EMA without the lag: bias-corrected iterate averaging schemes", 2025.
    """

    def __init__(
        self,
        ema_power: float = 0.5,
        bias_power: float = 0.2,
        lag: float = 10,
        multiplier: float = 1,
        every_n_steps: int = 1,
        start_step: int | float = 0,
        validate: Validate = "merged",
        name: str = "bema",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        start_step = start("start_step", start_step)
        super().__init__(
            BiasCorrectedMean(ema_power, bias_power, lag, multiplier, every_n_steps),
            schedule=EveryNSteps(every_n_steps, start=start_step),
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            **known(options, RuleOptions, self),
        )
