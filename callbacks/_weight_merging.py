"""The one callback that touches Lightning's hooks. Named callbacks choose a rule, a schedule and a selection for it."""

from typing import Any, Unpack

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_merge import weights
from lightning_merge._checks import flag, instance, one_of
from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._choice import Mode, refuse_higher_is_better
from lightning_merge._ranks import several
from lightning_merge.callbacks._accept_if_better import logged
from lightning_merge.callbacks._averaging_run._state import AveragingState
from lightning_merge.callbacks._averaging_run._tensors import Tensors
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._run import resolved
from lightning_merge.callbacks._publication._average import AverageOptions
from lightning_merge.callbacks._publication._callback import Published, Validate
from lightning_merge.callbacks._publication._passes import Validation
from lightning_merge.files._label import as_written
from lightning_merge.rules import Rule
from lightning_merge.schedules import EveryNSteps, Moment, Schedule
from lightning_merge.selections import Selection, chosen
from lightning_merge.weights import State, Weights

__all__ = ["Validate", "WeightMerging"]


class WeightMerging(Published):
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
        options: ``final_validation`` and ``final_checkpoint``, see ``AverageOptions``.

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
        **options: Unpack[AverageOptions],
    ) -> None:
        instance("rule", rule, Rule)
        schedule = EveryNSteps() if schedule is None else instance("schedule", schedule, Schedule)
        selection = chosen(selection, Selection())
        super().__init__(validate, name, optimizer, **options)
        if (monitor is not None) != (rule.wants_score is not None):
            need = "needs the metric it decides on" if rule.wants_score else "decides on no metric"
            raise ValueError(
                f"`monitor` must be given if the rule decides on a score: {rule!r} {need}, got {monitor!r}."
            )
        if mode is not None:
            one_of("mode", mode, Mode)
        elif monitor is not None:
            refuse_higher_is_better(self.title, monitor)
        self.rule = rule
        self.schedule = schedule
        self.selection = selection
        self.decides_by = None if monitor is None else checked_monitor("monitor", monitor)
        self.monitor = self.decides_by if rule.wants_score == "raw" else None
        self.mode: Mode = "min" if mode is None else mode
        self.stop_when_finished = flag("stop_when_finished", stop_when_finished)

        self.skipped_nonfinite = 0
        self.evaluations = 0

        self._active_rule = rule
        self._active_schedule = schedule
        self._state: State | None = None
        self._last_epoch = 0  # epochs completed when an epoch end was last handled
        self._tensors = Tensors(self.title, selection)

    # ---- what there is

    @property
    def updates(self) -> int:
        """Times that weights were taken in."""
        return int(self._state["updates"]) if self._state else 0

    @property
    def works_on_shards(self) -> bool:
        """Whether its rule does."""
        return self.rule.works_on_shards

    @property
    def decides_on_score(self) -> bool:
        """Whether its rule does."""
        return self.rule.decides_on_score

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the merged weights do."""
        return self.updates, self.evaluations

    @property
    def initial_share(self) -> float:
        """Share of the merged weights that is still the weights of the start, in [0, 1]."""
        return self._active_rule.initial_share(self._state) if self._state else 0.0

    @property
    def ready(self) -> bool:
        """Whether there is something to publish."""
        return self._state is not None and self._active_rule.stored(self._state) is not None

    def merged(self) -> Weights | None:
        result = self._active_rule.stored(self._state) if self._state else None
        if result is None:
            return None
        averaged = self._tensors.averaged
        if gone := averaged and result.keys() - averaged.keys():  # a window on disk has them still
            result = {name: tensor for name, tensor in result.items() if name not in gone}
        return {**result, **self._buffers}

    @property
    def left_alone(self) -> list[str]:
        return [] if self._publisher is None else self.selection.left_alone(self._publisher.inventory)

    def configuration(self) -> dict[str, Any]:
        fields = ("rule", "schedule", "selection", "stop_when_finished")
        ours = {f"`{field}` of {self.title}": repr(getattr(self, field)) for field in fields}
        return {**ours, **super().configuration()}

    def progress(self) -> dict[str, Any]:
        left_out = {f"how often {self.title} left out weights with a NaN": self.skipped_nonfinite}
        return {**super().progress(), **left_out}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live parameters and buffers that it merges, by canonical name; of sharded ones the part that is here."""
        return {**self._tensors.live, **self._tensors.live_copied}

    @property
    def checked(self) -> dict[str, Tensor]:
        return self._tensors.checked

    @property
    def watches_training(self) -> bool:
        return self.selection.trainable

    @property
    def captured(self) -> dict[str, Tensor]:
        return {**self._tensors.averaged, **self._tensors.copied}

    def describe(self) -> str:
        """What is merged and what it takes, in a few words."""
        numbers = sum(tensor.numel() for tensor in self._tensors.live.values())
        size = sum(t.numel() * weights.average_dtype(t).itemsize for t in self._tensors.live.values())
        return (
            f"{numbers:,} numbers in {len(self._tensors.live)} tensors ({size / 1e6:,.1f} MB a copy"
            f"{', in this process' if self.is_sharded else ''}), buffers: {self.selection.buffers}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r}, {self.schedule!r}, {self.selection!r}, name={self.name!r})"

    # ---- a fit begins and ends

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Starts to count optimizer steps, or goes on with the average of an earlier fit or a checkpoint."""
        if self.rule.keeps_files and several():
            raise ValueError(
                f"{self.title} keeps weights in files, and only one process can go on from those, got"
                f" {trainer.world_size}. Use host memory, where each process keeps its part of sharded parameters:"
                " `store='cpu'`, or no `directory`."
            )
        super().on_fit_start(trainer, pl_module)
        assert self._publisher is not None
        self._active_rule, self._active_schedule = resolved(trainer, [self.rule, self.schedule])
        self._publisher.look()
        self._look_up()
        if self._state is not None:
            self._go_on()
        if self.selection.buffers == "recompute":
            self._keep_recent_batches()
        self._publisher.begin(self, trainer.optimizers[self.optimizer])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An average that starts before training starts here, after everything was restored."""
        super().on_train_start(trainer, pl_module)
        if not self._resumed:
            self._last_epoch = trainer.current_epoch
        moment = Moment(self.steps, trainer.current_epoch)
        assert self._publisher is not None
        self._publisher.look()
        self._check_fit()
        if self._state is None and self._active_schedule.started(moment):
            self._start(weights.nonfinite(self.checked))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copies the batch, before the step can change it, if BatchNorm statistics will be measured again."""
        by_the_end = Moment(self.steps, trainer.current_epoch + 1, epoch_end=True)
        if self._recent is not None:
            self._recent.hold(batch, only_to_try=not self._active_schedule.started(by_the_end))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The end of an epoch is its last batch, so that the validation that follows measures the update."""
        if self._recent is not None:
            self._recent.keep()
        if trainer.is_last_batch:
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

    # ---- taking weights in

    def _end_epoch(self, trainer: Trainer) -> None:
        completed = trainer.current_epoch + 1
        if completed > self._last_epoch:
            self._last_epoch = completed
            moment = Moment(self.steps, completed, epoch_end=True)
            if self.wants(moment):
                assert self._publisher is not None
                self._publisher.look()
                self.take_in(moment, weights.nonfinite(self.checked))
            if self.steps == 0 and completed == 1:
                rank_zero_warn(
                    f"{self.title}: optimizer {self.optimizer} applied no step in the first epoch, so nothing can be"
                    " averaged. If it is stepped rarely or in a way that torch does not see, choose another with"
                    " `optimizer=`."
                )

    def wants(self, moment: Moment) -> bool:
        """Whether the average starts or takes weights in at this moment."""
        schedule = self._active_schedule
        return schedule.due(moment) if self._state is not None else schedule.started(moment)

    def take_in(self, moment: Moment, nonfinite: set[str]) -> None:
        """Starts the average if it has not started, and takes the live weights in if that is due.

        Args:
            moment: Now.
            nonfinite: Names of live tensors that hold a NaN or an infinity.
        """
        if not self._start(nonfinite) or not self._active_schedule.due(moment):
            return
        if not self._update():
            return
        self._note_update(moment.step)

    def _note_update(self, step: int) -> None:
        weights.copy_(self._buffers, self._tensors.live_copied)
        self.update_window = (self.update_window[0] if self.update_window else step, step)

    def _update(self) -> bool:
        """Hands the live weights to the rule; whether they were taken in."""
        assert self._state is not None
        self._active_rule.update(self._state, self._tensors.live)
        return True

    def _start(self, nonfinite: set[str]) -> bool:
        """Whether there is an average, and weights fit for it."""
        if culprits := nonfinite & self.captured.keys():
            self._skip(min(culprits))
            return False
        if self._state is None:
            self._state = self._active_rule.init(self._tensors.live)
            self._buffers = weights.copies(self._tensors.live_copied)
        return True

    def _skip(self, culprit: str) -> None:
        self.skipped_nonfinite += 1
        if self.skipped_nonfinite == 1:
            rank_zero_warn(
                f"{self.title}: `{culprit}` holds a NaN or an infinity after applied step {self.steps}. Such weights"
                " are never merged; the last good average is kept, and `skipped_nonfinite` counts how often. Lower the"
                " learning rate or clip gradients."
            )

    def _evaluate(self, trainer: Trainer, validation: Validation) -> None:
        assert self._state is not None
        rule = self._active_rule
        of_raw = rule.wants_score == "raw"
        metrics = trainer.callback_metrics if of_raw else validation.metrics_of(self.name)
        # The ranks must decide alike, also where the metric is not synchronised.
        score = trainer.strategy.broadcast(logged(self.title, self.decides_by, metrics))
        if not validation.has_logged(str(self.decides_by), None if of_raw else self):
            return
        if rule.merges_when_scored and (culprits := weights.nonfinite(self.checked)):
            self._skip(min(culprits))
            return
        updates = self.updates
        rule.evaluate(self._state, score if self.mode == "min" else -score, self._tensors.live)
        if self.updates != updates and rule.merges_when_scored:
            self._note_update(self.steps)
        self.evaluations += of_raw
        if self.stop_when_finished and rule.finished(self._state):
            trainer.should_stop = True

    # ---- which tensors

    def look_again(self) -> None:
        assert self._publisher is not None
        change = self._tensors.follow(self._publisher, self.steps)
        if self._state is None:
            return
        if change.gone or change.fresh:
            self._active_rule.forget(self._state, [*change.gone, *change.fresh])
        if change.fresh:
            self._active_rule.extend(self._state, weights.local(change.fresh))
        live = self._tensors.live_copied
        fitting = {n: b for n, b in self._buffers.items() if n in live and b.shape == live[n].shape}
        new = {name: tensor for name, tensor in live.items() if name not in fitting}
        self._buffers = {**fitting, **weights.copies(new)}

    def remarks(self) -> list[str]:
        assert self._publisher is not None
        pulled = self.selection.pulled_along(self._publisher.inventory)
        return [f"{self.title} merges `{n}` too: it is the same tensor as `{other}`." for n, other in pulled.items()]

    def _look_up(self) -> None:
        assert self._publisher is not None
        known: set[str] = set()
        if self._state is not None:
            with as_written(f"{self._publisher.checkpoints.path}: the state of the average `{self.name}`"):
                known = set(self._active_rule.stored(self._state) or ())
        self._tensors.start(self._publisher, known, self._buffers)
        self.is_sharded = self._tensors.is_sharded

    def _go_on(self) -> None:
        """Brings a state from before to the model's devices."""
        assert self._state is not None
        devices = {name: tensor.device for name, tensor in self.tensors.items()}
        path = "an earlier fit" if self._publisher is None else self._publisher.checkpoints.path
        with as_written(f"{path}: the state of the average `{self.name}`"):
            self._state = self._active_rule.load(self._state, devices)
            self._buffers = weights.to_devices(self._buffers, devices)
            average = self._active_rule.stored(self._state)
            moved = [name for name in average or () if name in self._tensors.copied]
            if moved:
                self._active_rule.forget(self._state, moved)  # an earlier version averaged them
                self._buffers |= weights.copies(
                    {n: self._tensors.live_copied[n] for n in moved if n not in self._buffers}
                )
        if not self._resumed and self._publisher is not None:
            self._publisher.continue_fit(self)

    def _check_fit(self) -> None:
        """Raises if a state from before belongs to another model; by now the module has made and tied what it has.

        Raises:
            ValueError: With the first name or shape that differs.
        """
        if self._state is None or (average := self._active_rule.stored(self._state)) is None:
            return
        if self._resumed and self._module is not None and not self._module.strict_loading:
            self._complete(average)
            average = self._active_rule.stored(self._state) or {}
        kept = {name: tensor for name, tensor in average.items() if name not in self._tensors.copied}
        if difference := weights.first_mismatch(self._tensors.live, kept):
            raise ValueError(
                f"{self.title} holds the average of another model: {difference}. Use a fresh callback, or the"
                " model and the selection that it was started with."
            )

    def _complete(self, average: Weights) -> None:
        """With ``strict_loading=False``, what a file has no average of starts now, and what the module has not goes."""
        assert self._state is not None
        live = self._tensors.live
        fresh = {name: tensor for name, tensor in live.items() if name not in average}
        gone = [name for name in average if name not in live]
        if fresh or gone:
            self._active_rule.forget(self._state, gone)
            self._active_rule.extend(self._state, fresh)
            rank_zero_info(
                f"{self.title}: the file and the module differ, which `strict_loading=False` allows. New averages of:"
                f" {', '.join(fresh) or 'none'}; dropped: {', '.join(gone) or 'none'}."
            )

    # ---- for the publisher

    def label(self) -> dict[str, Any]:
        """What every file says about this average."""
        return {"class": type(self).__name__, "rule": repr(self.rule), "steps": self.steps, "updates": self.updates}

    def save(self) -> dict[str, Any]:
        return AveragingState(
            state=None if self._state is None else self._active_rule.save(self._state),
            evaluations=self.evaluations,
            buffers=self._buffers,
            calibrated_at=self._calibrated_at,
            recent=None if self._recent is None else self._recent.saved(),
            last_epoch=self._last_epoch,
            update_window=None if self.update_window is None else list(self.update_window),
            skipped_nonfinite=self.skipped_nonfinite,
        ).section()

    def load(self, saved: dict[str, Any], label: dict[str, Any]) -> None:
        """Takes over what ``save`` and ``label`` gave."""
        if label["rule"] != repr(self.rule):
            rank_zero_warn(f"{self.title} goes on from a file that was written with {label['rule']}.")
        found = AveragingState.of(saved)
        self._state, self._buffers = found.state, found.buffers
        self.evaluations, self.skipped_nonfinite = found.evaluations, found.skipped_nonfinite
        self._calibrated_at, self._last_epoch = found.calibrated_at, found.last_epoch
        if found.recent is not None:
            self._recent = RecentBatches.restored(found.recent)
        self.update_window = None if found.update_window is None else (found.update_window[0], found.update_window[1])
        self.steps = label["steps"]
        self._resumed = True
        if self._tensors.averaged and self._state is not None:  # strategies that shard restore once the fit has started
            self._look_up()
            self._go_on()

    def adopt(self, average: Weights, updates: int, steps: int, epochs: int) -> bool:
        """See ``Published``: rules that keep an average and counts can."""
        assert self._publisher is not None
        module = self._publisher.inventory
        live = {**self.selection.parameters(module), **self.selection.averaged_buffers(module)}
        state = self.rule.init({name: average[name] for name in live})
        if not state.keys() <= {"average", "mean", "updates", "initial_share", "compensation"}:
            return False
        state["updates"] = updates
        if "initial_share" in state:
            state["initial_share"] = 0.0  # such files do not say
        self._state = state
        self._buffers = weights.copies({name: average[name] for name in self.selection.copied_buffers(module)})
        self.steps, self._last_epoch, self._resumed = steps, epochs, True
        return True

    def to_host(self) -> None:
        """Follows the module to host memory after a fit, so no accelerator memory stays taken."""
        host = torch.device("cpu")
        if self._state is not None:
            self._state = self._active_rule.load(self._state, dict.fromkeys(self.tensors, host))
        self._buffers = weights.to_devices(self._buffers, host)

    def note_the_end(self) -> None:
        """One line if nothing was merged, or if much of what was merged is the start."""
        if self._state is not None and (sentence := self._active_rule.conclude(self._state)):
            rank_zero_info(f"{self.title}: {sentence}")
        if not self.ready:
            rank_zero_info(
                f"{self.title} merged nothing: {self.schedule!r} was not due in {self.steps} applied steps and"
                f" {self._last_epoch} epochs. The raw weights are kept, as without the callback. Start earlier."
            )
            return
        assert self._state is not None
        share = self._active_rule.initial_share(self._state)
        if share > 0.1 and self.steps and not self.rule.start_is_meant:
            fit = 0.1 ** (1 / self.steps)
            rank_zero_info(
                f"{self.title}: {share:.0%} of the published average is still the weights of the start. For a run of"
                f" {self.steps} steps `decay={fit:.4g}` leaves 10 %; or use `half_life` or `warmup`."
            )
