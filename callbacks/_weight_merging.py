"""The one callback that touches Lightning's hooks. Named callbacks choose a rule, a schedule and a selection for it."""

from typing import Any, Unpack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lightning_merge import weights
from lightning_merge._checks import flag, instance, one_of
from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._choice import Mode, refuse_higher_is_better
from lightning_merge.callbacks._averaging_run._by_rule import MergingByRule
from lightning_merge.callbacks._lightning._internals import ends_epoch
from lightning_merge.callbacks._lightning._run import resolved
from lightning_merge.callbacks._publication._callback import Validate
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.rules import Rule
from lightning_merge.schedules import EveryNSteps, Moment, Schedule
from lightning_merge.selections import Selection, chosen

__all__ = ["Validate", "WeightMerging"]


class WeightMerging(MergingByRule):
    """Merges the weights of a run by a rule and publishes the result: for validation, in checkpoints, after the fit.

    Add it to the Trainer you have; nothing else changes. Raw weights train on undisturbed. What it promises:

    - Validation measures what ``validate`` says; the first average in the callback list owns the plain metric names,
      others log ``<name>/...``, and raw weights ``raw/...`` where an average owns the plain ones.
    - A file that ``ModelCheckpoint`` writes holds, in ``state_dict``, the weights its monitored metric was measured on.
    - As long as nothing has been merged, metrics, model and files are those of a run without the callback.
    - After the fit the module holds the merged weights of the first average; ``raw_weights()`` gives the others.

    Args:
        rule: How weights are merged.
        schedule: When; by default after every applied optimizer step.
        selection: Which tensors, and what becomes of buffers.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files; unique in the Trainer.
        optimizer: Index of the optimizer whose applied steps are counted; at least 0.
        monitor: For a rule that wants a score, and only for one: the metric that it is told after each validation, of
            the raw weights or of the merged ones, as the rule says.
        mode: ``"min"`` if lower is better, ``"max"`` if higher is; by default lower.
        stop_when_finished: Stop training once nothing more can change what such a rule merges.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Attributes:
        steps: Applied optimizer steps counted so far.
        update_window: First and last applied step whose weights were taken in; ``None`` before the first update.
        skipped_nonfinite: Updates left out because the weights held a NaN or an infinity.
        final_path: The file written at the end of the fit, if checkpointing is on.
        final_metrics: Metrics measured on the final merged weights, under plain names.

    Raises:
        TypeError: If ``rule`` is not a rule or ``schedule`` not a schedule.
        ValueError: If another argument is out of range, or at fit start if it does not fit the run.

    Example:
        >>> from lightning_merge.rules import Mean
        >>> from lightning_merge.schedules import EveryNSteps
        >>> WeightMerging(Mean(), EveryNSteps(10, start=0.5), name="tail").name
        'tail'
    """

    def __init__(
        self,
        rule: Rule,
        schedule: Schedule | None = None,
        selection: Selection | None = None,
        validate: Validate = "merged",
        name: str = "merged",
        *,
        optimizer: int = 0,
        monitor: str | None = None,
        mode: Mode | None = None,
        stop_when_finished: bool = False,
        **options: Unpack[RuleOptions],
    ) -> None:
        instance("rule", rule, Rule)
        if (monitor is not None) != (rule.wants_score is not None):
            need = "needs the metric it decides on" if rule.wants_score else "decides on no metric"
            raise ValueError(
                f"`monitor` must be given if the rule decides on a score: {rule!r} {need}, got {monitor!r}."
            )
        if mode is not None:
            one_of("mode", mode, Mode)
        elif monitor is not None:
            refuse_higher_is_better(f"{type(self).__name__} {name!r}", monitor)
        super().__init__(
            rule,
            EveryNSteps() if schedule is None else instance("schedule", schedule, Schedule),
            chosen(selection, Selection()),
            validate,
            name,
            optimizer,
            None if monitor is None else checked_monitor("monitor", monitor),
            "min" if mode is None else mode,
            flag("stop_when_finished", stop_when_finished),
            **known(options, RuleOptions, self),
        )

    # ---- a fit begins and ends

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count optimizer steps, or goes on with the average of an earlier fit or a checkpoint."""
        self._refuse_files_of_several()
        super().on_fit_start(trainer, pl_module)
        self._active_rule, self._active_schedule = self._resolved(trainer)
        self._session.look()
        self._look_up()
        if self._state is not None:
            self._go_on()
        if self.selection.buffers == "recompute":
            self._keep_recent_batches()
        self._session.begin(self, trainer.optimizers[self.optimizer])

    def _resolved(self, trainer: Trainer) -> tuple[Rule, Schedule]:
        """The rule and the schedule in steps of this run."""
        rule, schedule = resolved(trainer, [self.rule, self.schedule])
        return rule, schedule

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average that starts before training starts here, after everything was restored."""
        super().on_train_start(trainer, pl_module)
        if not self._resumed:
            self._last_epoch = trainer.current_epoch
        moment = Moment(self.steps, trainer.current_epoch)
        self._session.look()
        self._check_fit()
        self.begin(moment)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copies the batch, before the step can change it, if BatchNorm statistics will be measured again."""
        if self._undecided is not None and self._undecided.finding.is_there:
            self.decide()  # which lets go of what it keeps of before
        if self._recent is not None:
            by_the_end = Moment(self.steps, trainer.current_epoch + 1, epoch_end=True)
            self._recent.hold(batch, only_to_try=not self._active_schedule.started(by_the_end))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The end of an epoch is its last batch, so that the validation that follows measures the update."""
        if self._recent is not None:
            self._recent.keep()
        if ends_epoch(trainer):
            self._end_epoch(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells a rule that wants a score how its weights did. Comes before any checkpoint is written."""
        if self._state is None or self._publisher is None or self.rule.wants_score is None:
            return
        validation = self._publisher.validation
        if validation.is_evaluation if self.rule.wants_score == "raw" else validation.is_judging(self):
            self._evaluate(trainer, validation)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch that was cut short (``max_steps``, an exhausted loader) ends here, after its validation."""
        self._end_epoch(trainer)

    def _end_epoch(self, trainer: Trainer) -> None:
        completed = trainer.current_epoch + 1
        if completed > self._last_epoch:
            self._last_epoch = completed
            moment = Moment(self.steps, completed, epoch_end=True)
            if self.wants(moment):
                self._session.look()
                self.take_in(moment, weights.find_nonfinite(self.checked))
            if self.steps == 0 and completed == 1:
                rank_zero_warn(
                    f"{self.title}: optimizer {self.optimizer} applied no step in the first epoch, so nothing can be"
                    " averaged. If it is stepped rarely or in a way that torch does not see, choose another with"
                    " `optimizer=`."
                )
