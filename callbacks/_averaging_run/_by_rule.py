"""What an average by a rule does: it takes weights in, follows the module, and resumes."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_merge._averaging._elsewhere import check_room, placed
from lightning_merge._averaging._remarks import mostly_the_start
from lightning_merge._averaging._second_sets import has_second_set
from lightning_merge._averaging._state import AveragingState
from lightning_merge._ranks import agreed
from lightning_merge._said import is_of_another_class, is_said
from lightning_merge.callbacks._accept_if_better import logged
from lightning_merge.callbacks._averaging_run._average_by_rule import AverageByRule
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._publication._passes import Validation
from lightning_merge.files._label import as_written
from lightning_merge.weights import Weights


class MergingByRule(AverageByRule):
    """An average that is told what happens in a fit."""

    # ---- scores

    def _evaluate(self, trainer: Trainer, validation: Validation) -> None:
        rule = self._active_rule
        of_raw = rule.wants_score == "raw"
        score = self._told(trainer.callback_metrics if of_raw else validation.metrics_of(self.name), validation)
        if score is None:
            return
        if not self._take_score(score if self.mode == "min" else -score):
            return
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
        self._follow(self._session)

    def remarks(self) -> list[str]:
        pulled = self.selection.pulled_along(self._session.inventory)
        said = [f"{self.title} merges `{n}` too: it is the same tensor as `{other}`." for n, other in pulled.items()]
        optimizer = self._session.trainer.optimizers[self.optimizer]
        if has_second_set(optimizer):
            said.append(
                f"{self.title} merges the weights that {type(optimizer).__name__} trains, not those that it gives for"
                " evaluation; `EvaluationWeights()` measures and saves these."
            )
        return said

    def _look_up(self) -> None:
        known: set[str] = set()
        if self._state is not None:
            with as_written(f"{self._session.checkpoints.path}: the state of the average `{self.name}`"):
                known = set(self._active_rule.stored(self._state) or ())
        self._tensors.start(self._session, known, self._buffers)
        self.is_sharded = self._tensors.is_sharded
        if self._tensors.is_elsewhere and self._state is None:
            check_room(self.title, self.tensors)

    def _go_on(self) -> None:
        """Brings a state from before to the model's devices."""
        path = "an earlier fit" if self._publisher is None else self._publisher.checkpoints.path
        with as_written(f"{path}: the state of the average `{self.name}`"):
            self._to_devices()
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
        cure = "Use a fresh callback, or the model and the selection that it was started with."
        self._refuse_another_model(average, cure)

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
        if not is_said(label["rule"], self.rule):
            self._refuse_another_rule(label["rule"])
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

    def _refuse_another_rule(self, written: str) -> None:
        """Other settings of a rule go on with its state; another rule keeps something else."""
        if is_of_another_class(written, self.rule):
            raise ValueError(
                f"{self.title} cannot go on from an average of that name that was written with {written}: resume with"
                " that, or give this one another `name`, with which it starts empty."
            )

    def note_the_end(self) -> None:
        """One line if nothing was merged, or if much of what was merged is the start."""
        self.decide()
        if self._background is not None and (waited := self._background.waited) >= 1.0:
            rank_zero_info(
                f"{self.title}: training waited {waited:.1f} s in all for updates in host memory. Take weights in less"
                " often to wait less."
            )
        said = self._active_rule.conclude(self._state) if self._state is not None else None
        if said:
            rank_zero_info(f"{self.title}: {said}")
        if not self.ready and not said:
            rank_zero_info(
                f"{self.title} merged nothing: {self.schedule!r} was not due in {self.steps} applied steps and"
                f" {self._last_epoch} epochs. The raw weights are kept, as without the callback. Start earlier."
            )
        elif (
            self.ready
            and not self.rule.start_is_meant
            and (sentence := mostly_the_start(self.initial_share, self.steps))
        ):
            rank_zero_info(f"{self.title}: {sentence}")
