"""Whether a run's averages are worth publishing, said at its end."""

import math
from functools import partial

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._checks import whole
from lightning_merge._choice import refuse_higher_is_better
from lightning_merge.callbacks._accept_if_better import begin_to_judge, refuse_unlogged
from lightning_merge.callbacks._post_hoc_ema import PostHocEMA
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._session import Judge, Publisher
from lightning_merge.diagnostics import MOST_POINTS, Examination, examine
from lightning_merge.rules._power_means import widths_between
from lightning_merge.shards import sharded_tensors
from lightning_merge.weights import Weights


class Doctor(Judge, Callback):
    """Examines, at the end of a fit, every average and the raw weights beside it, and says what is wrong.

    Of a ``PostHocEMA`` it also measures which width would have been best, of those between the two that are tracked.

    It looks at the loss on the line between them, their distance, BatchNorm statistics, NaN, and how much of the
    average is still the start. It prints a line; ``examinations["ema"].report()`` has every figure. It changes nothing:
    ``AcceptIfBetter`` acts.

    Args:
        monitor: A loss that validation logs, under its plain name.
        points: Points between raw and merged weights, a validation run each; at least 1. As many again, with the two
            that are tracked, between the widths of a ``PostHocEMA``.

    Attributes:
        examinations: Of every average by name.
        widths: Of every ``PostHocEMA`` by name: the loss by width, as a share of the run.

    Raises:
        ValueError: If ``points`` is less than 1 or ``monitor`` is no loss by its name, at fit start if there is no
            validation or no average, or at the first validation if it does not log the loss.

    Example:
        >>> Doctor(points=1).monitor
        'val/loss'
    """

    brings = ("examinations", "widths")

    def __init__(self, monitor: str = "val/loss", points: int = 3) -> None:
        self.monitor = checked_monitor("monitor", monitor)
        refuse_higher_is_better(type(self).__name__, self.monitor)
        self.points = whole("points", points, 1, MOST_POINTS)
        self.examinations: dict[str, Examination] = {}
        self.widths: dict[str, dict[float, float]] = {}
        self.expect()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run in which it could not measure."""
        begin_to_judge(self, trainer)
        if sharded := sharded_tensors(pl_module):
            raise ValueError(
                f"Doctor measures distances of whole weights, and `{next(iter(sharded))}` is sharded. Leave it out, or"
                " examine checkpoints after the run: lightning-merge doctor."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a loss that is not logged as soon as that is known."""
        refuse_unlogged(self, trainer)

    def consider(self, publisher: Publisher) -> None:
        """Examines. Called before anything final is measured or saved."""
        for average in publisher.averages:
            if average.ready:
                self.examinations[average.name] = self._examine(publisher, average)
                rank_zero_info(f"Doctor's verdict: {self.examinations[average.name].summary()}")

                if isinstance(average, PostHocEMA):
                    self._compare_widths(publisher, average)

    def _compare_widths(self, publisher: Publisher, average: PostHocEMA) -> None:
        """Measures widths from the narrowest to the widest that is tracked, evenly spread in proportion."""
        losses: dict[float, float] = {}
        for sigma in widths_between(average.sigmas, self.points):
            made = average.synthesise(sigma)
            losses[sigma] = self._loss(publisher, average, made | average.statistics(made))
        self.widths[average.name] = losses
        rank_zero_info(f"Doctor: {_advice(average, losses)}")

    def _loss(self, publisher: Publisher, average: Average, candidate: Weights) -> float:
        found = publisher.validation.probe(average, publisher.publishable(average, candidate))
        return found.get(self.monitor, math.nan)

    def _examine(self, publisher: Publisher, average: Average) -> Examination:
        return examine(
            {"raw": publisher.apart.of_first(publisher.raw(average)), average.name: publisher.set_of(average)},
            loss=partial(self._loss, publisher, average),
            measure_statistics=average.statistics,
            initial_shares={average.name: average.initial_share},
            points=self.points,
        )


def _advice(average: PostHocEMA, losses: dict[float, float]) -> str:
    """Which width would have been best, and what to type for it."""
    known = {sigma: loss for sigma, loss in losses.items() if not math.isnan(loss)}
    if not known:
        return f"the loss of no width of {average.name} is a number."
    best, published = min(known, key=known.__getitem__), max(losses)
    text = f"of the widths of {average.name}, {best:.3g} of the run has the lowest loss, {known[best]:.4g}"
    if best == published:
        wider = f"`sigmas=({best:.3g}, {min(2 * best, 0.28):.3g})`"
        return f"{text}, and is published. It is the widest one that is tracked: try {wider}."
    cure = f"`synthesise({best:.4g})` makes it"
    if best == min(losses):
        cure += f"; it is the narrowest one that is tracked: try `sigmas=({best / 2:.3g}, {best:.3g})`"
    return f"{text}, where {published:.3g} is published, with {losses[published]:.4g}. {cure}."
