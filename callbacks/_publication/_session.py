"""One fit: counts steps, hands weights to the averages, and at its end measures, saves and publishes them."""

import operator
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer

from lightning_merge import weights
from lightning_merge._ranks import check_agreement, settings_of, several
from lightning_merge._whole_steps import hook_whole_steps, is_around, was_skipped
from lightning_merge.callbacks._lightning._metrics import is_restoring
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._lightning._strategies import refuse_unsupported
from lightning_merge.callbacks._publication._average import Average, Ending
from lightning_merge.callbacks._publication._checkpoint import Checkpoints
from lightning_merge.callbacks._publication._exchange import Exchange
from lightning_merge.callbacks._publication._health import Health
from lightning_merge.callbacks._publication._homecoming import Traveller, pack_for_home, take_to_host
from lightning_merge.callbacks._publication._passes import Validation
from lightning_merge.callbacks._publication._toll import Toll
from lightning_merge.schedules import Moment
from lightning_merge.shards import reshard, sharded_tensors


class Judge(Traveller, ABC):
    """A callback that looks at the averages at the end of a fit: a doctor, or a judge of what is published."""

    brings: tuple[str, ...] = ()
    """Attributes with what it found."""
    monitor: str
    """The metric that it looks at."""
    at_the_end = False
    """Whether training is over, so that nothing may be refused any more: what was trained would be lost."""

    def luggage(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.brings}

    def come_home(self, luggage: dict[str, Any]) -> None:
        self.__dict__.update(luggage)

    def join(self, trainer: Any) -> None:
        """Adds averages of its own to the callbacks, once. Called before the session of a fit knows its averages."""

    @abstractmethod
    def consider(self, publisher: "Publisher") -> None:
        """Called before anything final is measured or saved."""


class Publisher(Exchange):
    """The session of all averages of one Trainer, for one fit.

    Args:
        trainer: A Trainer of ``lightning.pytorch`` or of ``pytorch_lightning``; the two share no class.
        module: The module that is trained.

    Raises:
        ValueError: If the strategy is not supported, or the averages do not go together.
    """

    def __init__(self, trainer: Any, module: LightningModule) -> None:
        refuse_unsupported(trainer.strategy)
        super().__init__(trainer, module)
        self.patches = Patches()
        self._hooks: list[Any] = []
        self._counted: list[tuple[Optimizer, Average]] = []
        self.validation = Validation(self)
        self.checkpoints = Checkpoints(self, self.validation)
        self.checkpoints.wrap(self.patches)
        self.patches.replace(trainer.strategy, "teardown", self._teardown)
        self._health = Health(self)
        self._toll = Toll()
        self._is_in_step = False
        self._parts: list[weights.Weights] = []  # what several averages look at
        self._whole = weights.Fixed()  # all of it
        self._went_on: str | None = None  # how this fit goes on from an earlier one of the same callbacks
        self._take_raw_back()

    @classmethod
    def attach(cls, trainer: Any, module: LightningModule) -> "Publisher":
        """The publisher of the Trainer's current fit; the first average makes it."""
        for judge in [callback for callback in trainer.callbacks if isinstance(callback, Judge)]:
            judge.join(trainer)
        return cls.of(trainer) or cls(trainer, module)

    @classmethod
    def of(cls, trainer: Any) -> "Publisher | None":
        """The publisher of the Trainer's current fit, if it has averages."""
        # The averages keep it: it keeps the Trainer, and lives no longer than them.
        kept = [publisher for callback in trainer.callbacks if (publisher := getattr(callback, "_publisher", None))]
        current = (publisher for publisher in kept if publisher.trainer is trainer and not publisher.is_over)
        return next(current, None)

    @property
    def is_over(self) -> bool:
        """Whether the fit has ended and nothing of the Trainer is wrapped any more."""
        return not self.patches

    # ---- a fit begins and ends

    def begin(self, average: Average, optimizer: Optimizer) -> None:
        """Counts the applied steps of an average's optimizer; the last average to begin also wraps the loops."""
        if not any(other is optimizer for other, _ in self._counted):
            self._hooks += hook_whole_steps(optimizer, self._before_step, self._after_step)
        self._counted.append((optimizer, average))
        self.begun.append(average)
        if len(self._counted) == len(self.averages):
            self.watches_training = any(other.watches_training for other in self.averages)
            self.check_configuration()
            self.validation.wrap(self.patches)
            self.checkpoints.wrap_writers(self.patches)
            self.patches.replace(self.trainer.strategy, "optimizer_step", self._step)
            self._health.wrap(self.patches)
            self.validation.announce()

    @property
    def _judges(self) -> list[Judge]:
        return [callback for callback in self.trainer.callbacks if isinstance(callback, Judge)]

    def check_configuration(self) -> None:
        """Raises in every process if they are not set up alike: each would wait for what another never does."""
        fields: dict[str, Any] = {"its averages": [average.title for average in self.averages]}
        sharded_tensors(self.module)  # raises if one cannot be averaged
        for average in self.averages:
            fields |= average.configuration()
        for callback in self._judges:
            fields |= settings_of(callback)
        check_agreement(fields, "Give every process the same callbacks and model.")

    def _step(self, original: Callable[..., Any], optimizer: Any, closure: Any, *args: Any, **kwargs: Any) -> Any:
        """Counts the steps of optimizers that came in the place of others, as those that a hook sets up again.

        An average of what was unfrozen starts where that does, so the weights are looked at between `training_step` and
        the step of the optimizer.
        """
        for number, (counted, average) in enumerate(self._counted):
            now = self.trainer.optimizers[average.optimizer]
            if not is_around(now, counted):
                if not any(other is now for other, _ in self._counted):
                    self._hooks += hook_whole_steps(now, self._before_step, self._after_step)
                self._counted[number] = now, average

        def looking() -> Any:
            result = closure()
            self._look_before_step()
            return result

        within, self._is_in_step = self._is_in_step, True
        try:
            return original(optimizer, looking, *args, **kwargs)
        finally:
            self._is_in_step = within

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not self._is_in_step:
            self._look_before_step()  # it is one that Lightning knows nothing of

    def _look_before_step(self) -> None:
        if self.watches_training and not self.busy:
            self.look()

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.busy or is_restoring(self.trainer) or was_skipped(optimizer):
            return
        began = time.perf_counter()
        wanting: list[tuple[Average, Moment]] = []
        for counted, average in self._counted:
            if counted is optimizer:
                average.steps += 1
                average.accepted = None  # what was chosen at the end of an earlier fit
                moment = Moment(average.steps, self.trainer.current_epoch)
                if average.wants(moment):
                    wanting.append((average, moment))
        if wanting:
            self._hand_over(wanting)
        self._toll.note(optimizer, began, [average for average, _ in wanting])

    def _hand_over(self, wanting: list[tuple[Average, Moment]]) -> None:
        self.look()
        finding = weights.find_nonfinite(self._checked([average for average, _ in wanting]))  # all share one look
        with weights.in_one_pass() if len(wanting) > 1 else nullcontext():
            for average, moment in wanting:
                average.take_in(moment, finding)

    def _checked(self, averages: list[Average]) -> weights.Weights:
        """What of the weights is looked at for averages; kept as long as it is the same."""
        each = [average.checked for average in averages]
        if len(each) == 1:
            return each[0]
        if len(each) != len(self._parts) or any(map(operator.is_not, each, self._parts)):
            self._parts = each
            self._whole = weights.Fixed({name: tensor for part in each for name, tensor in part.items()})
        return self._whole

    def accept(self, average: Average, share: float) -> None:
        """Publishes, in the place of an average, the point at this share of the way to it from the raw weights."""
        accepted = share if share < 1 else None
        if average.accepted == accepted:
            return  # what is known about it stays true
        average.accepted = accepted
        average.forget_statistics()
        self.validation.forget(average)

    def _take_raw_back(self) -> None:
        """Puts the raw weights of an earlier fit back in place, unless the live ones have changed since.

        Before anything of this fit happens: whatever is saved, tuned or restored from here on is about raw weights.
        """
        endings = {id(average.ending): average.ending for average in self.averages if average.ending is not None}
        for ending in endings.values():
            if ending.is_live(self.module):
                live = weights.local(self.inventory.tensors)
                weights.copy_({name: live[name] for name in ending.raw if name in live}, ending.raw)
                self._went_on = "the raw weights are back in place"
            else:
                self._went_on = "the live weights are not the published ones any more, so training starts from them"
        for average in self.averages:
            average.ending = None

    @property
    def is_apart(self) -> bool:
        """Whether the weights are not those that an earlier fit of the same callbacks left."""
        return self._went_on is not None and not self._went_on.startswith("the raw")

    @property
    def is_continued(self) -> bool:
        """Whether the weights are those that an earlier fit of the same callbacks left."""
        return self._went_on is not None and not self.is_apart

    def continue_fit(self, average: Average) -> None:
        """Says how the fit goes on from an earlier one."""
        how = f"; {self._went_on}" if self._went_on and average is self.primary else ""
        rank_zero_info(f"{average.title} goes on with its average of {average.updates} updates{how}.")

    def finish(self) -> None:
        """After the last step: measures and saves each final set, and makes the primary's the model's weights."""
        self.check_progress()
        for average in self.averages:
            average.note_the_end()
        ready = [average for average in self.averages if average.ready]
        for average in ready:
            self.apart.make_one(average)
        for callback in self._judges if ready else []:
            callback.at_the_end = True
            callback.consider(self)
        self.validation.measure_final(ready)
        for average in ready:
            average.final_metrics = self.validation.metrics_of(average.name)
            average.final_path = self._write_final(average)
            if average.final_path is not None:
                rank_zero_info(f"{average.title}: merged weights are in {average.final_path}")
        self._publish()

    def _write_final(self, average: Average) -> str | None:
        if not average.final_checkpoint:
            return None
        try:
            return self.checkpoints.write_final(average)
        except Exception as error:
            if several() or average.validate != "raw":
                raise
            rank_zero_warn(  # the run was asked for raw weights, and those are trained
                f"{average.title}: its final weights could not be saved, since {type(error).__name__} was raised:"
                f" {error}. `merged_weights()` has them; `final_checkpoint=False` leaves the file out."
            )
            return None

    def _publish(self) -> None:
        self.look()
        for average in self.averages:
            if average.ready:
                self.apart.make_one(average)
                average.recalibrate()  # the last chance: after the fit there is nothing to measure on
        if not self.primary.ready:
            return
        merged = self.set_of(self.primary)
        rest = self.apart.rest_of_first(merged)
        own = {name for average in self.averages for name in average.own}
        published = weights.copies({**{name: t for name, t in rest.items() if name not in own}, **merged})
        reshard(self.module)
        self.ending = Ending(
            raw=weights.exchange(self.inventory.tensors, published, ties=self.inventory.ties),
            primary=self.primary,
            buffers=weights.copies({name: published[name] for name in self.primary.buffer_names}),
        )
        for average in self.averages:
            average.ending = self.ending
        rank_zero_info(
            f"The model now holds the merged weights of {self.primary.title} ({self.primary.updates} updates);"
            " the raw ones are in its `raw_weights()`."
        )

    def interrupt(self) -> None:
        """From here on no forward pass and no collective may run. Raw weights are live, also after publication."""
        self.interrupted = True
        if self.ending is not None:
            reshard(self.module)
            weights.put_back(self.inventory.tensors, self.ending.raw, self.inventory.ties)
            self.ending = None
            for average in self.averages:
                average.ending = None

    def _teardown(self, original: Callable[[], None]) -> None:
        # The strategy's teardown is the one place that every fit passes, also those that fail.
        with ExitStack() as stack:  # whatever raises here, the Trainer is left as it was
            stack.callback(self.patches.undo)
            for average in self.averages:
                stack.callback(take_to_host, average, self)
            for hook in self._hooks:
                stack.callback(hook.remove)
            if self._hooks and self.ending is None and not self.interrupted:
                self._publish()  # a finished run was resumed: Lightning trains nothing and calls no `on_train_end`
            if self._hooks and not self.interrupted:
                pack_for_home(self.trainer)
            original()
        if self.ending is not None:
            self.ending.raw = weights.to_devices(self.ending.raw, torch.device("cpu"))
