"""Whether a run's averages are worth publishing, said at its end."""

import math

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._checks import whole
from lightning_merge._choice import refuse_higher_is_better
from lightning_merge.callbacks._accept_if_better import refuse_unlogged, refuse_without_validation
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._session import Judge, Publisher
from lightning_merge.diagnostics import MOST_POINTS, Examination, examine
from lightning_merge.shards import sharded_tensors
from lightning_merge.weights import Weights


class Doctor(Judge, Callback):
    """Examines, at the end of a fit, every average and the raw weights beside it, and says what is wrong.

    It looks at the loss on the line between them, their distance, BatchNorm statistics, NaN, and how much of the
    average is still the start. It prints a line; ``examinations["ema"].report()`` has every figure. It changes nothing:
    ``AcceptIfBetter`` acts.

    Args:
        monitor: A loss that validation logs, under its plain name.
        points: Points between raw and merged weights, a validation run each; at least 1.

    Attributes:
        examinations: Of every average by name.

    Raises:
        ValueError: If ``points`` is less than 1 or ``monitor`` is no loss by its name, at fit start if there is no
            validation or no average, or at the first validation if it does not log the loss.

    Example:
        >>> Doctor(points=1).monitor
        'val/loss'
    """

    brings = ("examinations",)

    def __init__(self, monitor: str = "val/loss", points: int = 3) -> None:
        self.monitor = checked_monitor("monitor", monitor)
        refuse_higher_is_better(type(self).__name__, self.monitor)
        self.points = whole("points", points, 1, MOST_POINTS)
        self.examinations: dict[str, Examination] = {}
        self.expect()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run in which it could not measure."""
        refuse_without_validation(type(self).__name__, trainer)
        if sharded := sharded_tensors(pl_module):
            raise ValueError(
                f"Doctor measures distances of whole weights, and `{next(iter(sharded))}` is sharded. Leave it out, or"
                " examine checkpoints after the run: lightning-merge doctor."
            )

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a loss that is not logged as soon as that is known."""
        refuse_unlogged(type(self).__name__, self.monitor, trainer)

    def consider(self, publisher: Publisher) -> None:
        """Examines. Called before anything final is measured or saved."""
        for average in publisher.averages:
            if average.ready:
                self.examinations[average.name] = self._examine(publisher, average)
                rank_zero_info(f"Doctor: {self.examinations[average.name].summary()}")

    def _examine(self, publisher: Publisher, average: Average) -> Examination:
        def loss(candidate: Weights) -> float:
            found = publisher.validation.probe(average, publisher.publishable(average, candidate))
            return found.get(self.monitor, math.nan)

        return examine(
            {"raw": publisher.apart.of_first(publisher.raw(average)), average.name: publisher.set_of(average)},
            loss=loss,
            measure_statistics=average.statistics,
            initial_shares={average.name: average.initial_share},
            points=self.points,
        )
