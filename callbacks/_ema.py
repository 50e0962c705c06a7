"""EMA: exponential moving average of the training weights."""

from typing import Literal, Unpack

from lightning_merge._checks import start, whole
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import ExponentialMean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection, chosen


class EMA(WeightMerging):
    """Exponential moving average: ``average <- decay * average + (1 - decay) * weights`` after each optimizer step.

    Args:
        decay: Share of the old average kept per optimizer step, in [0, 1). Default 0.999. With ``every_n_steps=u`` an
            update keeps ``decay ** u``.
        every_n_steps: Applied optimizer steps (not batches) between updates; at least 1.
        start_step: The average starts as a copy of the weights after this applied step (0: before training). A float
            in [0, 1) is a share of the run.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        half_life: Instead of ``decay``: after how long a weight counts half, as steps (``500``), ``"2 epochs"`` or a
            share of the run (``"5%"``).
        warmup: How the decay grows at the start: ``None``, ``"timm"``, ``"diffusers"`` or ``"ema_pytorch"``.
        compensated: Keep what rounding loses in a second copy; for decays above about 0.9999.
        selection: Which tensors are averaged and what happens to buffers; by default all parameters, and
            floating-point buffers averaged along.
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of its range, or at fit start if a share or epochs are asked of a run whose
            length is not known.

    Example:
        >>> EMA(decay=0.999).name
        'ema'

    References:
        Polyak and Juditsky, Acceleration of stochastic approximation by averaging, 1992. Morales-Brotons, Vogels and
        Hendrikx, Exponential moving average of weights in deep learning, TMLR 2024.
    """

    def __init__(
        self,
        decay: float | None = None,
        every_n_steps: int = 1,
        start_step: int | float = 0,
        validate: Validate = "merged",
        name: str = "ema",
        *,
        half_life: str | float | None = None,
        warmup: Literal["timm", "diffusers", "ema_pytorch"] | None = None,
        compensated: bool = False,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        start_step = start("start_step", start_step)
        super().__init__(
            ExponentialMean(
                decay, half_life=half_life, steps_per_update=every_n_steps, warmup=warmup, compensated=compensated
            ),
            schedule=EveryNSteps(every_n_steps, start=start_step),
            selection=chosen(selection, Selection(buffers="average")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            **known(options, RuleOptions, self),
        )
