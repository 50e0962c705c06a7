"""The one callback that touches Lightning's hooks. Named callbacks choose a rule, a schedule and a selection for it."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_merge import weights
from lightning_merge._checks import flag, instance
from lightning_merge._checks import monitor as checked_monitor
from lightning_merge._choice import refuse_higher_is_better
from lightning_merge._ranks import several
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._run import resolved
from lightning_merge.callbacks._publication._callback import Published, Validate
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
        monitor: For a rule that decides on a score, and only for one: the metric of the raw weights that it is told
            after each validation, lower is better.
        stop_when_finished: Stop training once nothing more can change what such a rule merges.

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
        stop_when_finished: bool = False,
    ) -> None:
        instance("rule", rule, Rule)
        schedule = EveryNSteps() if schedule is None else instance("schedule", schedule, Schedule)
        selection = chosen(selection, Selection())
        super().__init__(validate, name, optimizer)
        if (monitor is not None) != rule.decides_on_score:
            need = "needs the metric it decides on" if rule.decides_on_score else "decides on no metric"
            raise ValueError(
                f"`monitor` must be given if the rule decides on a score: {rule!r} {need}, got {monitor!r}."
            )
        if monitor is not None:
            refuse_higher_is_better(self.title, monitor)
        self.rule = rule
        self.schedule = schedule
        self.selection = selection
        self.monitor = None if monitor is None else checked_monitor("monitor", monitor)
        self.stop_when_finished = flag("stop_when_finished", stop_when_finished)

        self.skipped_nonfinite = 0
        self.evaluations = 0

        self._active_rule = rule
        self._active_schedule = schedule
        self._state: State | None = None
        self._last_epoch = 0  # epochs completed when an epoch end was last handled
        self._captured: dict[str, Tensor] = {}  # what goes through the rule: parameters and averaged buffers
        self._captured_buffers: dict[str, Tensor] = {}
        self._started_anew: set[str] = set()  # tensors of which it was said
        self._copied: set[str] = set()  # tensors that are copied whatever the selection says, since no mean is right

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
        if gone := self._captured and result.keys() - self._captured.keys():  # a window on disk has them still
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
        return {**self._live, **self._live_buffers}

    @property
    def checked(self) -> dict[str, Tensor]:
        """All but those that held an infinity from the start, as masks and bounds do."""
        copied = self._copied
        return {name: t for name, t in self.tensors.items() if name not in copied} if copied else self.tensors

    @property
    def watches_training(self) -> bool:
        return self.selection.trainable

    @property
    def captured(self) -> dict[str, Tensor]:
        return {**self._captured, **self._captured_buffers}

    @property
    def _live(self) -> dict[str, Tensor]:
        # At each use: FSDP may give a parameter another storage in the first forward pass.
        return weights.local(self._captured) if self.is_sharded else self._captured

    @property
    def _live_buffers(self) -> dict[str, Tensor]:
        return weights.local(self._captured_buffers) if self.is_sharded else self._captured_buffers

    def describe(self) -> str:
        """What is merged and what it takes, in a few words."""
        numbers = sum(tensor.numel() for tensor in self._live.values())
        size = sum(t.numel() * weights.average_dtype(t).itemsize for t in self._live.values())
        return (
            f"{numbers:,} numbers in {len(self._live)} tensors ({size / 1e6:,.1f} MB a copy"
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
        self._captured, self._captured_buffers = {}, {}  # of an earlier fit
        self._capture()
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
        """Tells a rule that decides on a score how the raw weights did. Comes before any checkpoint is written."""
        if self._state is not None and self._publisher is not None and self._publisher.validation.is_evaluation:
            self._evaluate(trainer)

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
        weights.copy_(self._buffers, self._live_buffers)
        first = self.update_window[0] if self.update_window else moment.step
        self.update_window = (first, moment.step)

    def _update(self) -> bool:
        """Hands the live weights to the rule; whether they were taken in."""
        assert self._state is not None
        self._active_rule.update(self._state, self._live)
        return True

    def _start(self, nonfinite: set[str]) -> bool:
        """Whether there is an average, and weights fit for it."""
        if culprits := nonfinite & self.captured.keys():
            self._skip(min(culprits))
            return False
        if self._state is None:
            self._state = self._active_rule.init(self._live)
            self._buffers = weights.copies(self._live_buffers)
        return True

    def _skip(self, culprit: str) -> None:
        self.skipped_nonfinite += 1
        if self.skipped_nonfinite == 1:
            rank_zero_warn(
                f"{self.title}: `{culprit}` holds a NaN or an infinity after applied step {self.steps}. Such weights"
                " are never merged; the last good average is kept, and `skipped_nonfinite` counts how often. Lower the"
                " learning rate or clip gradients."
            )

    def _evaluate(self, trainer: Trainer) -> None:
        assert self._state is not None
        if self.monitor is None:
            return
        if self.monitor not in trainer.callback_metrics:
            seen = ", ".join(sorted(trainer.callback_metrics)) or "none"
            raise ValueError(
                f"{self.title}: `monitor` must be a metric that validation logs, got {self.monitor!r}; it logs: {seen}."
            )
        # The ranks must decide alike, also where the metric is not synchronised.
        score = trainer.strategy.broadcast(float(trainer.callback_metrics[self.monitor]))
        self._active_rule.evaluate(self._state, score)
        self.evaluations += 1
        if self.stop_when_finished and self._active_rule.finished(self._state):
            trainer.should_stop = True

    # ---- which tensors

    def look_again(self) -> None:
        if self._captured:
            self._capture()

    def remarks(self) -> list[str]:
        assert self._publisher is not None
        pulled = self.selection.pulled_along(self._publisher.inventory)
        return [f"{self.title} merges `{n}` too: it is the same tensor as `{other}`." for n, other in pulled.items()]

    def _capture(self) -> None:
        """Looks up what is merged, and what was replaced, unfrozen or removed since the last time."""
        assert self._publisher is not None
        inventory = self._publisher.inventory
        before = self._captured
        chosen = self.selection.chosen(inventory) if before else self.selection.parameters(inventory)
        names = {*chosen, *self.selection.averaged_buffers(inventory)}
        names |= before.keys() if before else self._averaged_so_far()  # what was averaged once stays so, if frozen too
        buffers = self.selection.copied_buffers(inventory)
        self._copied |= self._to_be_copied({n: t for n, t in inventory.tensors.items() if n in names - before.keys()})
        self._copied |= self._constant({n: b for n, b in buffers.items() if n not in self._captured_buffers})
        copied = buffers.keys() | (self._copied & names)
        self._captured_buffers = {name: t for name, t in inventory.tensors.items() if name in copied}
        self._captured = {name: t for name, t in inventory.tensors.items() if name in names - copied}
        self.is_sharded = any(map(weights.is_sharded, self.captured.values()))
        if before:
            self._follow(before)

    def _averaged_so_far(self) -> set[str]:
        average = self._active_rule.stored(self._state) if self._state is not None else None
        return set() if average is None else set(average)

    def _to_be_copied(self, new: dict[str, Tensor]) -> set[str]:
        """Which tensors are taken from the model as they are at each update, since no mean of them is right.

        That goes for masks and bounds, which hold an infinity before anything is trained, and for the vectors of
        spectral normalisation, which are iterated under the merged weights.
        """
        assert self._publisher is not None
        return new.keys() & (self._buffers.keys() | self._publisher.singular_vectors | self._constant(new))

    @staticmethod
    def _constant(new: Mapping[str, Tensor]) -> set[str]:
        """Those that hold an infinity, and that no training made."""
        return weights.nonfinite(weights.local({name: t for name, t in new.items() if not t.requires_grad}))

    def _follow(self, before: dict[str, Tensor]) -> None:
        """Makes the average that of the tensors which are there now.

        Raises:
            ValueError: If a parameter has gone or has another shape.
        """
        live = self._captured
        if gone := [name for name in before if name not in live]:
            self._let_go(gone, before)
        anew = [name for name, tensor in live.items() if name in before and self._is_another(before[name], tensor)]
        for name in anew:
            self._start_anew(name, before[name])
        fresh = {name: tensor for name, tensor in live.items() if name not in before or name in anew}
        if self._state is None:
            return
        if fresh:
            self._active_rule.forget(self._state, fresh)
            self._active_rule.extend(self._state, weights.local(fresh))
        kept = {n: b for n, b in self._buffers.items() if n in self._live_buffers}
        fitting = {name: buffer for name, buffer in kept.items() if buffer.shape == self._live_buffers[name].shape}
        new = {name: tensor for name, tensor in self._live_buffers.items() if name not in fitting}
        self._buffers = {**fitting, **weights.copies(new)}

    @staticmethod
    def _is_another(before: Tensor, now: Tensor) -> bool:
        """Whether a tensor has to be averaged anew; a buffer of the same shape that is assigned goes on."""
        if now is before or weights.is_sharded(now):
            return False
        return isinstance(now, torch.nn.Parameter) or now.shape != before.shape

    def _start_anew(self, name: str, before: Tensor) -> None:
        now = self._captured[name]
        if isinstance(now, torch.nn.Parameter) and now.shape != before.shape:
            raise ValueError(
                f"{self.title} averages `{name}`, which was replaced after step {self.steps} and has shape"
                f" {tuple(now.shape)} instead of {tuple(before.shape)}: numbers that come and go have no average. Leave"
                f" it out: `selection=Selection(exclude=[{name!r}])`."
            )
        if name not in self._started_anew:
            self._started_anew.add(name)
            rank_zero_info(f"{self.title}: `{name}` was replaced after step {self.steps}; its average starts anew.")

    def _let_go(self, gone: list[str], before: dict[str, Tensor]) -> None:
        """Stops averaging what is not there any more, if that is a buffer or goes under another name now."""
        assert self._publisher is not None
        for name in gone:
            is_known = name in self._publisher.inventory.aliases or name in self._captured_buffers
            if isinstance(before[name], torch.nn.Parameter) and not is_known:
                raise ValueError(
                    f"{self.title} averages `{name}`, which the module does not have any more after step {self.steps}:"
                    " it was removed or renamed, as pruning, parametrizations and adapters do. Make that change before"
                    f" the fit, or leave the parameter out: `selection=Selection(exclude=[{name!r}])`."
                )
            if not is_known:
                rank_zero_info(
                    f"{self.title}: the buffer `{name}` has gone after step {self.steps}; so is its average."
                )
        if self._state is not None:
            self._active_rule.forget(self._state, gone)

    def _go_on(self) -> None:
        """Brings a state from before to the model's devices."""
        assert self._state is not None
        devices = {name: tensor.device for name, tensor in self.tensors.items()}
        path = "an earlier fit" if self._publisher is None else self._publisher.checkpoints.path
        with as_written(f"{path}: the state of the average `{self.name}`"):
            self._state = self._active_rule.load(self._state, devices)
            self._buffers = weights.to_devices(self._buffers, devices)
            average = self._active_rule.stored(self._state)
            moved = [name for name in average or () if name in self._captured_buffers]
            if moved:
                self._active_rule.forget(self._state, moved)  # an earlier version averaged them
                self._buffers |= weights.copies({n: self._live_buffers[n] for n in moved if n not in self._buffers})
        if not self._resumed and self._publisher is not None:
            self._publisher.continue_fit(self)

    def _check_fit(self) -> None:
        """Raises if a state from before belongs to another model; by now the module has made and tied what it has.

        Raises:
            ValueError: With the first name or shape that differs.
        """
        average = self._active_rule.stored(self._state) if self._state is not None else None
        if average is not None and self._resumed and not self._is_strict:
            self._complete(average)
            assert self._state is not None
            average = self._active_rule.stored(self._state)
        kept = {name: tensor for name, tensor in (average or {}).items() if name not in self._captured_buffers}
        difference = None if average is None else weights.first_mismatch(self._live, kept)
        if difference is not None:
            raise ValueError(
                f"{self.title} holds the average of another model: {difference}. Use a fresh callback, or the"
                " model and the selection that it was started with."
            )

    @property
    def _is_strict(self) -> bool:
        """Whether a file has to hold all that the module has, and nothing else."""
        return self._module is None or bool(self._module.strict_loading)

    def _complete(self, average: Weights) -> None:
        """With ``strict_loading=False``, what a file has no average of starts now, and what the module has not goes."""
        assert self._state is not None
        live = self._live
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
        """What a full file needs to go on bit for bit."""
        return {
            "state": None if self._state is None else self._active_rule.save(self._state),
            "evaluations": self.evaluations,
            "buffers": self._buffers,
            "calibrated_at": self._calibrated_at,
            "recent": None if self._recent is None else self._recent.saved(),
            "last_epoch": self._last_epoch,
            "update_window": None if self.update_window is None else list(self.update_window),
            "skipped_nonfinite": self.skipped_nonfinite,
        }

    def load(self, saved: dict[str, Any], label: dict[str, Any]) -> None:
        """Takes over what ``save`` and ``label`` gave."""
        if label["rule"] != repr(self.rule):
            rank_zero_warn(f"{self.title} goes on from a file that was written with {label['rule']}.")
        self._state = saved["state"]
        self._buffers = saved["buffers"]
        self.evaluations = saved["evaluations"]
        self._calibrated_at = saved["calibrated_at"]
        if saved["recent"] is not None:
            self._recent = RecentBatches.restored(saved["recent"])
        self._last_epoch = saved["last_epoch"]
        self.update_window = None if saved["update_window"] is None else tuple(saved["update_window"])
        self.skipped_nonfinite = saved["skipped_nonfinite"]
        self.steps = label["steps"]
        self._resumed = True
        if self._captured and self._state is not None:  # strategies that shard restore after the fit has started
            self._captured = {}
            self._capture()
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
