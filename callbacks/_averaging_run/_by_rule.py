"""What an average by a rule does: it takes weights in, follows the module, and resumes."""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_merge import weights
from lightning_merge._ranks import agreed
from lightning_merge.callbacks._accept_if_better import logged
from lightning_merge.callbacks._averaging_run._average_by_rule import AverageByRule
from lightning_merge.callbacks._averaging_run._elsewhere import Background, Taken, placed, refuse_without_room
from lightning_merge.callbacks._averaging_run._remarks import mostly_the_start
from lightning_merge.callbacks._averaging_run._state import AveragingState
from lightning_merge.callbacks._averaging_run._undecided import Undecided, by_reference
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._publication._passes import Validation
from lightning_merge.files._label import as_written
from lightning_merge.schedules import Moment
from lightning_merge.weights import Finding, Weights


class MergingByRule(AverageByRule):
    """An average that is told what happens in a fit."""

    _had_begun = False  # before the update that is under way in host memory

    # ---- taking weights in

    def wants(self, moment: Moment) -> bool:
        """Whether the average starts or takes weights in at this moment."""
        schedule = self._active_schedule
        # An update that is under way is not waited for where it is known that there is an average.
        is_known = self._had_begun and self._background is not None and self._background.is_busy
        return schedule.due(moment) if is_known or self._state is not None else schedule.started(moment)

    def take_in(self, moment: Moment, finding: Finding) -> None:
        """Starts the average if it has not started, and takes the live weights in if that is due.

        Where the device has not said yet whether the weights hold a NaN, they are taken in all the same, in a way that
        can be taken back; ``decide`` does that.

        Args:
            moment: Now.
            finding: Which live tensors hold a NaN or an infinity.
        """
        if self._tensors.is_elsewhere and self._active_rule.can_be_undone:
            self._take_in_beside(moment, finding)
            return
        if finding.is_there or not self._active_rule.can_be_undone or not self._tensors.has_room:
            self._take_in(moment, finding.names(), self._tensors.taken())
            return
        state, buffers = by_reference(self._state), by_reference(self._buffers)
        before = Undecided(finding, set(self.captured), self.steps, state, buffers, self.update_window)
        with weights.made_anew():
            self._take_in(moment, set(), self._tensors.taken())
        self._undecided = before

    def _take_in_beside(self, moment: Moment, finding: Finding) -> None:
        """Copies the weights into host memory, where they are taken in while the device goes on."""
        self._had_begun = self._state is not None  # which waits for the update before
        taken = self._tensors.sent()

        def update() -> None:
            taken.way.wait()
            self._take_in(moment, finding.names(), taken)

        self._background = self._background or Background()
        self._background.begin(update)

    def _take_in(self, moment: Moment, nonfinite: set[str], taken: Taken) -> None:
        if not self._start(nonfinite, moment.step, taken) or not self._active_schedule.due(moment):
            return
        if not self._update(taken):
            return
        self._note_update(moment.step, taken)

    def _note_update(self, step: int, taken: Taken) -> None:
        weights.copy_(self._buffers, taken.copied)
        self.update_window = (self.update_window[0] if self.update_window else step, step)

    def _update(self, taken: Taken) -> bool:
        """Hands the weights to the rule; whether they were taken in."""
        with weights.joining() if self._active_rule.can_be_undone else nullcontext():
            self._active_rule.update(self._kept, taken.averaged)
        return True

    def _start(self, nonfinite: set[str], step: int, taken: Taken) -> bool:
        """Whether there is an average, and weights fit for it."""
        if nonfinite and (culprits := nonfinite & self.captured.keys()):
            self._skip(min(culprits), step)
            return False
        if self._state is None:
            self._state = self._active_rule.init(taken.averaged)
            self._buffers = weights.copies(taken.copied)
        return True

    def _evaluate(self, trainer: Trainer, validation: Validation) -> None:
        rule = self._active_rule
        of_raw = rule.wants_score == "raw"
        score = self._told(trainer.callback_metrics if of_raw else validation.metrics_of(self.name), validation)
        if score is None:
            return
        if rule.merges_when_scored and (culprits := weights.nonfinite(self.checked)):
            self._skip(min(culprits), self.steps)
            return
        updates = self.updates
        taken = self._tensors.taken() if rule.merges_when_scored else Taken(self._tensors.live, {})
        rule.evaluate(self._kept, score if self.mode == "min" else -score, taken.averaged)
        if self.updates != updates and rule.merges_when_scored:
            self._note_update(self.steps, taken)
        self.evaluations += of_raw
        if self.stop_when_finished and rule.finished(self._kept):
            trainer.should_stop = True

    def _told(self, metrics: Mapping[str, Any], validation: Validation) -> float | None:
        """The metric that the rule is told, in every process that of the first one that logs it; ``None`` if this
        validation has left it out.

        Raises:
            ValueError: In every process, if none has logged it.
        """
        monitor, of_raw = str(self.decides_by), self._active_rule.wants_score == "raw"
        known = agreed(dict.fromkeys(metrics))
        if of_raw and monitor not in known:
            raise ValueError(
                f"{self.title}: `monitor` must be a metric that validation logs, got {monitor!r}; it logs:"
                f" {', '.join(sorted(known)) or 'none'}."
            )
        is_new = monitor in metrics and validation.has_logged(monitor, None if of_raw else self)
        own = {monitor: float(metrics[monitor])} if is_new else {}
        if monitor not in known:
            logged(self.title, monitor, known)
        return validation.agreed(own).get(monitor)

    # ---- which tensors

    def look_again(self) -> None:
        self.decide()
        change = self._tensors.follow(self._session, self.steps)
        if self._state is None:
            return
        if change.gone or change.fresh:
            self._active_rule.forget(self._state, [*change.gone, *change.fresh])
        if change.fresh:
            self._active_rule.extend(self._state, placed(weights.local(change.fresh), self._tensors.is_elsewhere))
        live = self._tensors.live_copied
        fitting = {n: b for n, b in self._buffers.items() if n in live and b.shape == live[n].shape}
        new = {name: tensor for name, tensor in live.items() if name not in fitting}
        self._buffers = {**fitting, **placed(weights.copies(new), self._tensors.is_elsewhere)}

    def remarks(self) -> list[str]:
        pulled = self.selection.pulled_along(self._session.inventory)
        return [f"{self.title} merges `{n}` too: it is the same tensor as `{other}`." for n, other in pulled.items()]

    def _look_up(self) -> None:
        known: set[str] = set()
        if self._state is not None:
            with as_written(f"{self._session.checkpoints.path}: the state of the average `{self.name}`"):
                known = set(self._active_rule.stored(self._state) or ())
        self._tensors.start(self._session, known, self._buffers)
        self.is_sharded = self._tensors.is_sharded
        if self._tensors.is_elsewhere and self._state is None:
            refuse_without_room(self.title, self.tensors)

    def _go_on(self) -> None:
        """Brings a state from before to the model's devices."""
        devices = self._tensors.devices
        path = "an earlier fit" if self._publisher is None else self._publisher.checkpoints.path
        with as_written(f"{path}: the state of the average `{self.name}`"):
            self._state = self._active_rule.load(self._kept, devices)
            self._buffers = weights.to_devices(self._buffers, devices)
            average = self._active_rule.stored(self._kept)
            moved = [name for name in average or () if name in self._tensors.copied]
            if moved:
                self._active_rule.forget(self._kept, moved)  # an earlier version averaged them
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
        live = self._tensors.live
        fresh = {name: tensor for name, tensor in live.items() if name not in average}
        fresh = placed(fresh, self._tensors.is_elsewhere)
        gone = [name for name in average if name not in live]
        if fresh or gone:
            self._active_rule.forget(self._kept, gone)
            self._active_rule.extend(self._kept, fresh)
            rank_zero_info(
                f"{self.title}: the file and the module differ, which `strict_loading=False` allows. New averages of:"
                f" {', '.join(fresh) or 'none'}; dropped: {', '.join(gone) or 'none'}."
            )

    # ---- it is loaded, and ends

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

    def note_the_end(self) -> None:
        """One line if nothing was merged, or if much of what was merged is the start."""
        self.decide()
        if self._background is not None and (waited := self._background.waited) >= 1.0:
            rank_zero_info(
                f"{self.title}: training waited {waited:.1f} s in all for updates in host memory. Take weights in less"
                " often to wait less."
            )
        if self._state is not None and (sentence := self._active_rule.conclude(self._state)):
            rank_zero_info(f"{self.title}: {sentence}")
        if not self.ready:
            rank_zero_info(
                f"{self.title} merged nothing: {self.schedule!r} was not due in {self.steps} applied steps and"
                f" {self._last_epoch} epochs. The raw weights are kept, as without the callback. Start earlier."
            )
        elif not self.rule.start_is_meant and (sentence := mostly_the_start(self.initial_share, self.steps)):
            rank_zero_info(f"{self.title}: {sentence}")
