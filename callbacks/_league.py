"""Several averages of one run side by side, and the best of them in a file."""

import math
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_merge._checks import instance
from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._choice import Mode, best, mode_by_name
from lightning_merge._ranks import several
from lightning_merge.callbacks._accept_if_better import (
    AcceptIfBetter,
    begin_to_judge,
    refuse_other_mode,
    refuse_unlogged,
)
from lightning_merge.callbacks._averaging_run._average_by_rule import AverageByRule
from lightning_merge.callbacks._league_run._cost import Stopwatch, megabytes
from lightning_merge.callbacks._league_run._standing import Standing, samples, standard_error, table, verdict
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.callbacks._publication._callback import Published
from lightning_merge.callbacks._publication._ledger import RAW
from lightning_merge.callbacks._publication._session import Judge, Publisher
from lightning_merge.files._write import join


class League(Judge, Callback):
    """Runs averages side by side in one fit, ranks them and the raw weights, and writes the best to a file.

    The contestants join the Trainer's callbacks; they share the training, which they do not change, and one pass over
    the live weights. Other averages among the callbacks take part too. At the end each final set is measured once on
    the validation data, a table is printed, and ``league-winner.ckpt`` holds the best: a weights-only checkpoint beside
    the others, or in the run's folder. The score is that of the data it was chosen on, so it flatters: report
    ``trainer.test(model, datamodule=data, ckpt_path=league.path)``, which ``lightning-merge fit`` and ``run`` do.

    The model itself holds the first average's weights after the fit, as without a league. Of equal scores the raw
    weights win, then the first in the list; a NaN never wins.

    Args:
        contestants: Averages that change nothing about training, at least one, each under a ``name`` of its own.
            ``validate="raw"`` measures them at the end only.
        monitor: A metric that validation logs, under its plain name.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is. It can be left out where the last word of the name
            says it, as ``val/loss`` or ``val/acc``.

    Attributes:
        standings: Score, standard error and cost of each set by name, the raw weights first.
        winner: Name of the best set, ``"raw"`` among them; ``None`` before the end, or if no score can be chosen.
        path: The file with the winner's weights.
        test_metrics: What ``trainer.test`` with that file has logged.

    Raises:
        TypeError: If a contestant is not an average.
        ValueError: If there is none, two have one name, one would end the run or set its learning rate, or at fit
            start if there is no validation, or at the first validation if it does not log the metric, or if ``mode``
            is needed.

    Example:
        >>> from lightning_merge.callbacks import EMA, SWA
        >>> [each.name for each in League([EMA(0.99), SWA()], monitor="val/acc").contestants]
        ['ema', 'swa']
    """

    brings = ("standings", "winner", "path")

    def __init__(self, contestants: Sequence[Published], monitor: str, mode: Mode | None = None) -> None:
        instance("contestants", contestants, Sequence, "a list of averages")
        self.contestants = [instance("contestants", each, Published, "a list of averages") for each in contestants]
        if not self.contestants:
            raise ValueError("`contestants` must be averages, at least one, as [EMA(), SWA()], got none.")
        names = [each.name for each in self.contestants]
        if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
            raise ValueError(f"`contestants` must have a `name` each; several are called {twice[0]!r}: name='other'.")
        _refuse_meddling(self.contestants)
        refuse_other_mode(mode)
        self.monitor = checked_monitor("monitor", monitor)
        self.mode = mode_by_name(self.monitor) if mode is None else mode
        self.standings: dict[str, Standing] = {}
        self.winner: str | None = None
        self.path: str | None = None
        self.test_metrics: dict[str, float] = {}
        self._stopwatches: dict[str, Stopwatch] = {}
        self.expect()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Brings the contestants; averages before it in the list have done so already."""
        if stage == "fit":
            self.join(trainer)

    def join(self, trainer: Any) -> None:
        """Adds the contestants to the callbacks, right after itself: they are set up next."""
        callbacks: list[Callback] = trainer.callbacks
        new = [each for each in self.contestants if not any(each is other for other in callbacks)]
        place = next(index for index, callback in enumerate(callbacks) if callback is self) + 1
        callbacks[place:place] = new

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a run in which it could not compare."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # set outside the class
        begin_to_judge(self, trainer)
        if any(isinstance(callback, AcceptIfBetter) for callback in callbacks):
            raise ValueError("League and AcceptIfBetter both choose by a score at the end of the fit: keep one.")
        if sum(isinstance(callback, League) for callback in callbacks) > 1:
            raise ValueError(
                "several Leagues among the callbacks would write one file: give one of them all contestants."
            )
        _refuse_meddling([callback for callback in callbacks if isinstance(callback, Average)])
        self.standings, self.winner, self.path, self.test_metrics = {}, None, None, {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begins to time updates."""
        publisher = Publisher.attach(trainer, pl_module)
        self._stopwatches = {average.name: Stopwatch(average) for average in publisher.averages}
        for average in publisher.averages:
            publisher.patches.replace(average, "take_in", self._stopwatches[average.name].take_in)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a metric that is not logged as soon as that is known, and then one that needs a mode."""
        refuse_unlogged(self, trainer, needs_mode=True)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Says so if nothing was compared."""
        if not self.standings:
            rank_zero_info("League: nothing was ranked, since no average has merged anything in this fit.")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keeps what a test of the winner's file has logged, and says it."""
        if self.path is not None and str(trainer.ckpt_path) == self.path:
            self.test_metrics = {key: float(value) for key, value in trainer.callback_metrics.items()}
            listed = ", ".join(f"{key} {value:.4f}" for key, value in self.test_metrics.items())
            rank_zero_info(f"League: {self.winner} on test data: {listed}.")

    def consider(self, publisher: Publisher) -> None:
        """Measures, ranks and writes the winner. Called before anything final is saved."""
        ready = [average for average in publisher.averages if average.ready]
        validation = publisher.validation
        validation.measure_final(ready, and_raw=True)  # which measures nothing twice
        scores = {RAW: validation.metrics_of(RAW) if validation.is_measured(None) else {}}
        for average in publisher.averages:
            measured = average in ready and validation.is_measured(average)
            scores[average.name] = validation.metrics_of(average.name) if measured else {}
        self._rank(publisher, {name: self._agreed(publisher, found) for name, found in scores.items()})

    def _agreed(self, publisher: Publisher, metrics: dict[str, float]) -> float | None:
        own = {self.monitor: metrics[self.monitor]} if self.monitor in metrics else {}
        return publisher.validation.agreed(own).get(self.monitor)

    def _rank(self, publisher: Publisher, measured: dict[str, float | None]) -> None:
        scores = {name: math.nan if score is None else score for name, score in measured.items()}
        n = samples(publisher.trainer)
        averages = {average.name: average for average in publisher.averages}
        self.standings = {
            name: Standing(
                score,
                standard_error(self.monitor, score, n),
                self._stopwatches[name].ms_per_step if name in averages else 0.0,
                megabytes(averages[name]) if name in averages else 0.0,
            )
            for name, score in scores.items()
        }
        unknown = {name for name, score in measured.items() if score is None}
        rank_zero_info(table(self.monitor, self.standings, n, unknown))
        ties = [] if self.mode is None else best(scores, self.mode)
        if not ties:
            rank_zero_info(f"League: no {self.monitor} can be chosen, so no set wins.")
            return
        self.winner = ties[0]
        self.path = self._write(publisher, averages.get(self.winner))
        where = "" if self.path is None else f"; its weights are in {self.path}"
        rank_zero_info(f"League: {verdict(self.monitor, self.winner, self.standings)}{where}.")

    def _write(self, publisher: Publisher, winner: Average | None) -> str | None:
        trainer = publisher.trainer
        folder = getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.log_dir or trainer.default_root_dir
        path = join(folder, "league-winner.ckpt")
        if trainer.fast_dev_run:
            return None
        # Under a strategy that shards, Lightning's test after a fit also reads the states of optimizers from it.
        slim = not trainer.strategy.restore_checkpoint_after_setup
        try:
            return publisher.checkpoints.write(path, winner, weights_only=slim)
        except Exception as error:
            if several():
                raise
            rank_zero_warn(f"League: {path} could not be written, since {type(error).__name__} was raised: {error}")
            return None


def _refuse_meddling(averages: Sequence[Average]) -> None:
    """Contestants share one training, so none may end or change it."""
    for each in averages:
        if not isinstance(each, AverageByRule):
            raise ValueError(
                f"{each.title} changes how the model trains, and all contestants of the League share one training:"
                " compare it with a run without it."
            )
        if getattr(each, "stop_when_finished", False):
            raise ValueError(f"{each.title} would end the run for all contestants of the League: give it `stop=False`.")
        if getattr(each, "swa_lr", None) is not None:
            raise ValueError(
                f"{each.title} would set the learning rate of all contestants of the League: leave `swa_lr` out."
            )
