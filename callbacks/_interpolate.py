"""Between and beyond the weights before and after a fit."""

from typing import Literal, Unpack, final

from lightning_merge._checks import real, whole
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import WeightMerging
from lightning_merge.rules import Interpolation
from lightning_merge.schedules import EveryNEpochs, FromStart
from lightning_merge.selections import Selection, chosen


@final
class Interpolate(WeightMerging):
    """``anchor + alpha * (weights - anchor)`` at the end of each epoch: part of the way back to where the fit began.

    Keeps what a model could before fine-tuning (WiSE-FT, LM-Cocktail, PAINT). Several side by side, under their names,
    measure several strengths in one fit.

    Args:
        alpha: Share of the change that is kept, in (0, 1].
        anchor: A checkpoint to go back to instead of the weights when the fit starts.
        every_n_epochs: Epochs between updates; at least 1. The end of the last one is what is published.
        selection: Which tensors, and what becomes of buffers.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics and files when it is not the first average.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        alpha: float = 0.5,
        anchor: str | None = None,
        every_n_epochs: int = 1,
        selection: Selection | None = None,
        validate: Literal["merged", "raw", "both"] = "merged",
        name: str = "interpolated",
        **options: Unpack[RuleOptions],
    ) -> None:
        alpha = real("alpha", alpha, "a number in (0, 1]")
        if not 0.0 < alpha <= 1.0:
            raise ValueError(f"`alpha` must be in (0, 1], got {alpha}. Above 1, use Extrapolate.")
        every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        super().__init__(
            Interpolation(alpha, anchor),
            schedule=FromStart(EveryNEpochs(every_n_epochs)),
            selection=chosen(selection, Selection()),
            validate=validate,
            name=name,
            **known(options, RuleOptions, self),
        )


@final
class Extrapolate(WeightMerging):
    """``anchor + alpha * (weights - anchor)`` with ``alpha`` above 1: on beyond where a short fit got (ExPO).

    Args:
        alpha: How many times the change is made, in (1, 10]; 1.1 to 1.5 is published for preference tuning.
        anchor: A checkpoint to measure the change from instead of the weights when the fit starts.
        every_n_epochs: Epochs between updates; at least 1. The end of the last one is what is published.
        selection: Which tensors, and what becomes of buffers; by default statistics are measured again, since a line
            that goes on beyond two variances ends below 0 where they fell.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics and files when it is not the first average.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        alpha: float = 1.3,
        anchor: str | None = None,
        every_n_epochs: int = 1,
        selection: Selection | None = None,
        validate: Literal["merged", "raw", "both"] = "merged",
        name: str = "extrapolated",
        **options: Unpack[RuleOptions],
    ) -> None:
        alpha = real("alpha", alpha, "a number in (1, 10]")
        if not 1.0 < alpha <= 10.0:
            raise ValueError(f"`alpha` must be in (1, 10], got {alpha}. Up to 1, use Interpolate.")
        every_n_epochs = whole("every_n_epochs", every_n_epochs, 1)
        super().__init__(
            Interpolation(alpha, anchor),
            schedule=FromStart(EveryNEpochs(every_n_epochs)),
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            **known(options, RuleOptions, self),
        )
