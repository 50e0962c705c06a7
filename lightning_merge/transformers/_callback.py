"""The callback."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from transformers import TrainerCallback

from lightning_merge import Averager
from lightning_merge._averaging._elsewhere import Device, checked_device
from lightning_merge._checks import flag, instance
from lightning_merge._ranks import is_first
from lightning_merge.rules import Rule
from lightning_merge.schedules import Schedule
from lightning_merge.selections import Selection, chosen
from lightning_merge.transformers._checkpoint import read, write
from lightning_merge.transformers._refused import refuse, refuse_sharding
from lightning_merge.transformers._running import running, surround
from lightning_merge.weights import Weights, named_tensors

_LOGGER = logging.getLogger("lightning_merge")


class MergeCallback(TrainerCallback):
    """Averages the weights of a ``transformers.Trainer``, or one made from it as TRL's, by any rule.

    - ``evaluate`` measures the merged weights, and so do ``metric_for_best_model``, early stopping and schedulers that
      wait for a metric. The raw ones train on undisturbed.
    - ``checkpoint-N`` and ``save_model`` hold the merged weights in the Trainer's own format: ``from_pretrained`` reads
      what was evaluated. Of a PEFT model that is the adapter, and only what trains is averaged.
    - Each checkpoint also has ``lightning_merge.pt``, with the raw weights and the average: ``resume_from_checkpoint``
      goes on bit for bit.
    - After ``train()`` the model holds the merged weights, or with ``load_best_model_at_end`` those of the best
      checkpoint.
    - Beside the loss of training the Trainer logs ``merged/updates``, ``merged/distance`` (from the raw weights),
      ``merged/start_share`` and ``merged/decay``, as far as they are known.
    - Until something was merged, everything is as without the callback.

    It works on one device and under DDP.

    Args:
        rule: How weights are merged, as ``ExponentialMean(0.999)``.
        schedule: When; by default after every applied optimizer step.
        selection: Which tensors; by default all that train, and floating-point buffers averaged.
        device: Where the average is: ``None`` for where the weights are, ``"cpu"`` for host memory.
        log_health: Whether how the average stands is logged, which takes a pass over the weights each time.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range; when the Trainer is made, if that is to shard; when training begins,
            if it does not fit the run.

    Example:
        >>> from lightning_merge.rules import ExponentialMean
        >>> MergeCallback(ExponentialMean(0.999)).averager is None
        True
    """

    def __init__(
        self,
        rule: Rule,
        schedule: Schedule | None = None,
        selection: Selection | None = None,
        *,
        device: Device = None,
        log_health: bool = True,
    ) -> None:
        self.rule = instance("rule", rule, Rule)
        if rule.wants_score is not None:
            raise ValueError(
                f"`rule` must decide by no score, since evaluation measures the merged weights alone, got {rule!r}. Use"
                " ExponentialMean, Mean or WindowMean, with `load_best_model_at_end` to choose by a metric."
            )
        self.schedule = None if schedule is None else instance("schedule", schedule, Schedule)
        self.selection = chosen(selection, Selection(trainable=True))
        if self.selection.buffers == "recompute":
            raise ValueError(
                "`selection` must have buffers='average' or 'copy', got 'recompute': there are no batches at hand to"
                " measure BatchNorm statistics on."
            )
        self.device = checked_device(device)
        self.log_health = flag("log_health", log_health)
        self.averager: Averager | None = None
        self._ended_at = 0  # step at which the last epoch that was counted ended
        self._raw: Weights = {}
        self._undo: list[Callable[[], None]] = []

    # ---- what there is

    def merged_weights(self) -> Weights | None:
        """The merged weights by canonical name, in the average's precision; ``None`` if there are none.

        They are the stored tensors: clone before writing.
        """
        return None if self.averager is None else self.averager.merged_weights()

    def raw_weights(self) -> Weights:
        """The raw weights that ``train()`` ended with, of what was merged; empty if the best checkpoint was loaded."""
        return dict(self._raw)

    # ---- a training begins and ends

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses what is known when the Trainer is made."""
        refuse_sharding(args.fsdp, args.deepspeed)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Starts the average, or goes on with that of the checkpoint, and puts merged weights around evaluation."""
        self._let_go()
        run = running(self)
        refuse(run.trainer, self)
        self._raw, self._ended_at = {}, state.global_step
        self.averager = averager = Averager(
            run.trainer.model,
            run.trainer.optimizer,
            self.rule,
            self.schedule,
            self.selection,
            run=run.length,
            device=self.device,
        )
        if run.resumed_from is not None:
            saved = read(run.resumed_from, named_tensors(run.trainer.model))
            if saved is not None:
                averager.load_state_dict(saved)
        self._undo = [
            surround(run.trainer, "evaluate", lambda *args, **kwargs: averager.merged()),
            surround(run.trainer, "predict", lambda *args, **kwargs: averager.merged()),
            surround(run.trainer, "save_model", self._saving(averager, run.trainer)),
            *([surround(run.trainer, "log", self._logging(averager))] if self.log_health else ()),
        ]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends an epoch at its last step: a run that resumes from a checkpoint of that step begins the next epoch."""
        if state.epoch is not None and state.epoch == int(state.epoch):
            self._end_epoch(state.global_step)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ends an epoch whose length was not known. The evaluation after it measures what is merged here."""
        self._end_epoch(state.global_step)

    def _end_epoch(self, step: int) -> None:
        if self.averager is not None and self._ended_at != step:
            self._ended_at = step
            self.averager.end_epoch()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leaves the merged weights in the model, unless the best checkpoint, which holds such, was loaded."""
        self._let_go()
        if self.averager is None:
            return
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.averager.close()
            said = f"The model holds the merged weights of {state.best_model_checkpoint}."
        elif self.averager.ready:
            self._raw = self.averager.publish()
            said = f"The model holds the merged weights of {self.averager.updates} updates."
        else:
            self.averager.close()
            said = "Nothing was merged: the schedule was not due. The model holds the raw weights."
        if is_first():
            _LOGGER.info(said)

    def _let_go(self) -> None:
        for undo in self._undo:
            undo()
        self._undo = []
        if self.averager is not None:
            self.averager.close()

    def _saving(self, averager: Averager, trainer: Any) -> Callable[..., AbstractContextManager[None]]:
        @contextmanager
        def around(output_dir: str | None = None, _internal_call: bool = False) -> Iterator[None]:
            if _internal_call and output_dir is not None and trainer.args.should_save:
                goes_on = not trainer.args.save_only_model
                raw = averager.raw_weights() if goes_on and averager.ready else {}
                write(output_dir, averager.state_dict() if goes_on else None, raw)
            with averager.merged():
                yield

        return around

    @staticmethod
    def _logging(averager: Averager) -> Callable[..., AbstractContextManager[None]]:
        @contextmanager
        def around(logs: dict[str, float], *args: Any, **kwargs: Any) -> Iterator[None]:
            if "loss" in logs:  # what is logged of training, not of an evaluation or the end
                logs.update({**averager.health(), **logs})
            yield

        return around
