"""An average in a loop that nobody wraps: it follows an optimizer and a module."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import nn
from torch.optim import Optimizer

from lightning_merge import weights
from lightning_merge._averaging._elsewhere import check_room
from lightning_merge._averaging._in_place import in_place, publishable, writes_refused
from lightning_merge._averaging._standing import standing
from lightning_merge._averaging._state import AveragingState
from lightning_merge._averaging._taking_in import TakingIn
from lightning_merge._averaging._watching import Watching
from lightning_merge._eval_mode import Derived, extends_train
from lightning_merge._said import is_of_another_class, is_said
from lightning_merge._whole_steps import hook_whole_steps, was_skipped, weakly
from lightning_merge.calibration import batch_norm_layers, recalibrated_statistics
from lightning_merge.files._label import as_written
from lightning_merge.rules import Rule
from lightning_merge.schedules import Moment, RunLength, Schedule
from lightning_merge.selections import Selection
from lightning_merge.spectral import iterate_
from lightning_merge.weights import Weights
from lightning_merge.weights._fixed import averaged_in
from lightning_merge.weights._sizes import norms_of


@final
class Loop(TakingIn):
    """What an ``Averager`` does; its arguments are those of that, checked.

    Args:
        module: What is trained, without what is around it.
        optimizer: Whose applied steps are counted.
        rule: How weights are merged.
        schedule: When.
        selection: Which tensors, and what becomes of buffers.
        run: How long the run will be.
        on_host: Whether the average is to be in host memory.
    """

    @torch.inference_mode(False)
    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        rule: Rule,
        schedule: Schedule,
        selection: Selection,
        run: RunLength,
        on_host: bool,
    ) -> None:
        super().__init__(f"the average by {type(rule).__name__}", rule, schedule, selection, on_host)
        self._active_rule, self._active_schedule = rule.resolve(run), schedule.resolve(run)
        self._refuse_files_of_several()
        sharded = weights.sharded_tensors(module)
        if sharded and not rule.works_on_shards:
            raise ValueError(
                f"`rule` needs whole parameters, and `{next(iter(sharded))}` is sharded. Use DDP, or a rule that works"
                f" on parts, as ExponentialMean, got {rule!r}."
            )
        if shapeless := [name for name, tensor in weights.named_tensors(module).items() if tensor.is_meta]:
            raise ValueError(
                f"`model` must have the weights that training starts from, and `{shapeless[0]}` is on the meta device:"
                " make the average after `to_empty` and initialisation, or after the weights were loaded."
            )
        self.watched = Watching(module)
        self.watched.watches_training = self.watches_training
        self._tensors.start(self.watched, (), ())
        if self._tensors.is_elsewhere:
            check_room(self._tensors.title, self.tensors)
        self._refuse_others_parameters(optimizer)
        self._before: Weights | None = None  # the raw weights while merged ones are in their place
        self._calibrated_at: tuple[int, int] | None = None  # `version` when the statistics were measured
        self.begin(Moment(0, 0))
        self._begun_with = self._sizes()
        # The optimizer lives longer than an average that nobody holds any more, as where a notebook's cell runs again.
        self._hooks = hook_whole_steps(optimizer, weakly(self._before_step), weakly(self._after_step))
        for hook in self._hooks:
            weakref.finalize(self, hook.remove)

    def _refuse_others_parameters(self, optimizer: Optimizer) -> None:
        inventory = self.watched.inventory
        ours = [*self._tensors.averaged.values(), *(other for each in inventory.ties.values() for other in each)]
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not stepped & set(map(id, ours)):
            raise ValueError(
                f"`optimizer` must step parameters of {inventory.title} that are averaged, and steps none of them. Make"
                " it of `model.parameters()`, after `fully_shard` and whatever else replaces them."
            )

    # ---- steps

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._before is not None:
            raise RuntimeError("an optimizer step inside of `merged()` would train the average: leave the block first.")
        if self.watches_training or not self.steps:
            self._look()  # an average of what was unfrozen starts where it does
        if not self.steps:
            self._refuse_others_parameters(optimizer)
            self._begin_where_training_does()

    def _begin_where_training_does(self) -> None:
        """Starts the average anew if parameters were loaded, replaced, moved, or made equal by DDP since it started."""
        if not self.updates and self._begun_with != (sizes := self._sizes()):
            self._begun_with = sizes
            self._state, self._buffers = None, {}
            self.begin(Moment(0, self._last_epoch))

    def _sizes(self) -> list[str]:
        # Not of buffers: a forward pass before the first step writes to them.
        parameters = {
            name: t for name, t in self._tensors.live.items() if isinstance(self.captured[name], nn.Parameter)
        }
        return [
            f"{norms.device} {norms.dtype} {norms.tolist()}" for norms in norms_of(averaged_in(parameters).values())
        ]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if not was_skipped(optimizer):
            self.steps += 1
            self._note(Moment(self.steps, self._last_epoch))

    @torch.inference_mode(False)
    def end_epoch(self) -> None:
        self._last_epoch += 1
        self._note(Moment(self.steps, self._last_epoch, epoch_end=True))

    def _note(self, moment: Moment) -> None:
        if self.wants(moment):
            self._look()
            self.take_in(moment, weights.find_nonfinite(self.checked))

    @torch.inference_mode(False)
    def evaluate(self, score: float) -> bool:
        """Tells the rule a score; whether nothing can change the result any more."""
        self._look()
        return self._state is not None and self._take_score(score) and self._active_rule.finished(self._kept)

    def _look(self) -> None:
        if self._before is not None:
            return
        if self._tensors.is_sharded:
            weights.reshard(self.watched.module)
        if self.watched.has_changed():
            if self._state is None or not (self.steps or self.updates):
                self._state, self._buffers, self._begun_with = None, {}, []
                self._tensors.start(self.watched, (), ())  # nothing is averaged yet for which it mattered
            else:
                self._follow(self.watched)

    # ---- the result

    @torch.inference_mode(False)
    def standing(self) -> dict[str, float]:
        """How the average stands beside the raw weights, which inside of ``swapped`` are those set aside."""
        self._look()
        return standing(self, self.raw(), self._tensors.is_sharded)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Merged weights in the place of the raw ones; blocks within one another are one, and so is one without any."""
        merged = None if self._before is not None else self.published()
        if merged is None:
            yield
            return
        module, derived = self.watched.module, Derived(self.watched.module)
        with ExitStack() as stack:
            stack.callback(derived.make_anew)
            derived.let_go()
            stack.callback(setattr, self, "_before", None)
            self._before = Weights()
            stack.enter_context(in_place(module, self.watched.inventory, merged, self._before))
            stack.callback(derived.let_go)
            derived.make_anew()
            with writes_refused(self.watched.inventory.parameters, merged, self.merged() or {}):
                yield

    def raw(self) -> Weights:
        before = self._before or {}
        return {name: before.get(name, tensor).detach() for name, tensor in self.tensors.items()}

    @torch.inference_mode(False)  # what is made in that mode could not be trained on, nor averaged
    def published(self) -> Weights | None:
        """The merged tensors as they take the place of the live ones. All processes call this."""
        self._look()
        if not self.ready:
            return None
        is_old = self._calibrated_at != self.version
        if is_old and self.selection.buffers == "recompute" and batch_norm_layers(self.watched.module):
            raise RuntimeError(
                "BatchNorm statistics have to be measured again under the merged weights (`buffers='recompute'`): call"
                " `recalibrate(batches)` before `merged()` and `publish()`, or choose another `Selection(buffers=...)`."
            )
        if is_old and self.watched.singular_vectors & self._buffers.keys():
            self.calibrate((), None)
        names = {name for name, tensor in self.captured.items() if not isinstance(tensor, nn.Parameter)}
        parameters, buffers = publishable(self.watched.module, self.merged() or {}, self.tensors, names)
        if any(map(extends_train, self.watched.module.modules())):
            parameters = weights.copies(parameters)  # in eval mode it may write to them
        weights.mean_over_ranks_(buffers, self.captured)
        return {**parameters, **buffers}

    @torch.inference_mode(False)
    def calibrate(self, batches: Iterable[Any], forward: Callable[[Any], Any] | None) -> None:
        """Makes the buffers fit the merged weights: BatchNorm statistics, and vectors of spectral normalisation."""
        self._look()
        if not self.ready:
            return
        module, inventory = self.watched.module, self.watched.inventory
        vectors = self.watched.singular_vectors & self._buffers.keys()
        merged = weights.like({**(self.merged() or {}), **weights.copies(self._buffers)}, self.tensors)
        with in_place(module, inventory, merged, {}):
            iterate_(module)
            fresh = {} if forward is None else recalibrated_statistics(module, batches, forward)
            fresh |= weights.copies({name: inventory.buffers[name] for name in vectors})
        weights.copy_({name: self._buffers[name] for name in fresh}, fresh)
        self._calibrated_at = self.version

    @torch.inference_mode(False)
    def publish(self) -> Weights:
        """Leaves the merged weights in the module and counts no more steps; the raw ones that were there."""
        if self._before is not None:
            raise RuntimeError("`publish()` inside of `merged()` would be undone at its end: leave the block first.")
        if self._state is not None and (sentence := self._active_rule.conclude(self._state)):
            self._inform(f"{self._tensors.title}: {sentence}")
        merged = weights.copies(self.published() or {})
        self.close()
        weights.reshard(self.watched.module)
        return weights.exchange(self.watched.inventory.tensors, merged, ties=self.watched.inventory.ties)

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()

    # ---- it is saved and loaded

    def save(self) -> dict[str, Any]:
        state = AveragingState(
            state=None if self._state is None else self._active_rule.save(self._state),
            evaluations=self.evaluations,
            buffers=self._buffers,
            calibrated_at=self._calibrated_at and list(self._calibrated_at),
            recent=None,
            last_epoch=self._last_epoch,
            update_window=self.update_window and list(self.update_window),
            skipped_nonfinite=self.skipped_nonfinite,
        )
        return {"rule": repr(self.rule), "steps": self.steps, **state.section()}

    @torch.inference_mode(False)
    def load(self, saved: Mapping[str, Any]) -> None:
        """Takes over copies of what ``save`` gave; nothing if that does not fit."""
        self.decide()
        cure = "Load it into an average of the model, the selection and, where it is sharded, the mesh it is of."
        with as_written(f"the state of {self._tensors.title}"):
            found = AveragingState.of(saved)
            steps, rule = int(saved["steps"]), str(saved["rule"])
        if found.state is not None and is_of_another_class(rule, self.rule):
            raise ValueError(
                f"{self._tensors.title} cannot go on from the state of {rule}, which keeps something else: go on with"
                " that rule, or load no state, and the average starts from the live weights."
            )
        with as_written(f"the state of {self._tensors.title}"):
            state, buffers = weights.map_named(lambda name, tensor: tensor.clone(), [found.state, found.buffers])
            average = (
                None
                if state is None
                else self._active_rule.stored(self._active_rule.load(state, self._tensors.devices))
            )
        if average is not None:
            self._refuse_another(average, buffers, cure)
        if not is_said(rule, self.rule):
            self._warn(f"{self._tensors.title} goes on from a state of {rule}.")
        self._state, self._buffers, self.steps = state, buffers, steps
        self.evaluations, self.skipped_nonfinite = found.evaluations, found.skipped_nonfinite
        self._last_epoch = found.last_epoch
        self.update_window = None if found.update_window is None else (found.update_window[0], found.update_window[1])
        measured = found.calibrated_at
        self._calibrated_at = None if measured is None else (measured[0], measured[1])
        if state is not None:
            self._to_devices()

    def _refuse_another(self, average: Weights, buffers: Weights, cure: str) -> None:
        """Raises if a state is of another model; what it averages is averaged from here on, if it is frozen too."""
        known, copied = list(self._tensors.averaged), list(self._tensors.copied)
        self._tensors.start(self.watched, average, buffers)
        try:
            self._refuse_another_model(average, cure)
        except ValueError:
            self._tensors.start(self.watched, known, copied)
            raise
