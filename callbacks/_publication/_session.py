"""Which weights are live: one publisher for all averages of a Trainer puts merged ones in place and raw ones back."""

from collections import ChainMap
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_merge import weights
from lightning_merge._ranks import check_agreement, gathered, settings_of, several
from lightning_merge.callbacks._lightning._eval_mode import written_in_eval
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._lightning._strategies import refuse_unsupported
from lightning_merge.callbacks._publication._checkpoint import Checkpoints
from lightning_merge.callbacks._publication._passes import Validation
from lightning_merge.inventory import Inventory
from lightning_merge.schedules import Moment
from lightning_merge.shards import reshard, sharded_tensors
from lightning_merge.spectral import iterate_, singular_vectors
from lightning_merge.weights import Weights

if TYPE_CHECKING:
    from lightning_merge.callbacks._publication._callback import Published

_OTHER_MERGERS = {"WeightAveraging", "StochasticWeightAveraging", "EMACallback", "EMAHook"}


@dataclass
class Ending:
    """How a fit ended: the raw weights it set aside, and what took their place."""

    raw: Weights
    primary: "Published"
    buffers: Weights
    """The published buffers, which are those of all ranks while an average has its own."""

    def is_live(self, module: LightningModule) -> bool:
        """Whether the module still holds what was published."""
        reshard(module)
        live = weights.local(weights.named_tensors(module))
        published = {**(self.primary.published_weights() or {}), **self.buffers}
        same = all(
            name in live and live[name].shape == tensor.shape and torch.equal(live[name], tensor.to(live[name]))
            for name, tensor in published.items()
        )
        return all(gathered(same))


class Publisher:
    """Exchanges weights for all averages of one Trainer, for one fit.

    Args:
        trainer: A Trainer of ``lightning.pytorch`` or of ``pytorch_lightning``; the two share no class.
        module: The module that is trained.

    Raises:
        ValueError: If the strategy is not supported.
    """

    def __init__(self, trainer: Any, module: LightningModule) -> None:
        refuse_unsupported(trainer.strategy)
        self.trainer = trainer
        self.module = module
        self.averages = averages_of(trainer)
        self.ending: Ending | None = None
        self.interrupted = False
        self.inventory = Inventory(module)
        self.swapped_out: Mapping[str, Tensor] = {}  # raw tensors while merged ones are in their place
        self.busy = False  # whether a file is being written or read, for which torch may step optimizers
        self._vectors: tuple[int, set[str]] | None = None
        self._trained: tuple[bool, ...] = ()  # which parameters require gradients
        self.patches = Patches()
        self._hooks: list[Any] = []
        self._counted: list[tuple[Optimizer, Published]] = []
        self._watches_training = False
        self.validation = Validation(self)
        self.checkpoints = Checkpoints(self)
        self.checkpoints.wrap(self.patches)
        self.patches.replace(trainer.strategy, "teardown", self._teardown)
        self._went_on: str | None = None  # how this fit goes on from an earlier one of the same callbacks
        self._take_raw_back()

    @classmethod
    def attach(cls, trainer: Any, module: LightningModule) -> "Publisher":
        """The publisher of the Trainer's current fit; the first average makes it."""
        # The averages keep it: it keeps the Trainer, and lives no longer than them.
        kept = [publisher for callback in trainer.callbacks if (publisher := getattr(callback, "_publisher", None))]
        current = [publisher for publisher in kept if publisher.trainer is trainer and not publisher.is_over]
        return current[0] if current else cls(trainer, module)

    @property
    def is_over(self) -> bool:
        """Whether the fit has ended and nothing of the Trainer is wrapped any more."""
        return not self.patches

    @property
    def primary(self) -> "Published":
        """The first average of the callback list."""
        return self.averages[0]

    # ---- a fit begins and ends

    def begin(self, average: "Published", optimizer: Optimizer) -> None:
        """Counts the applied steps of an average's optimizer; the last average to begin also wraps the loops."""
        if not any(other is optimizer for other, _ in self._counted):
            self._hooks.append(optimizer.register_step_pre_hook(self._before_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_step))
        self._counted.append((optimizer, average))
        if len(self._counted) == len(self.averages):
            self._watches_training = any(other.watches_training for other in self.averages)
            self.check_configuration()
            self.validation.wrap(self.patches)
            self.checkpoints.wrap_writers(self.patches)
            self.validation.announce()

    def check_configuration(self) -> None:
        """Raises in every process if they are not set up alike: each would wait for what another never does."""
        fields: dict[str, Any] = {"its averages": [average.title for average in self.averages]}
        sharded_tensors(self.module)  # raises if one cannot be averaged
        for average in self.averages:
            fields |= average.configuration()
        for callback in filter(_judges, self.trainer.callbacks):
            fields |= settings_of(callback)
        check_agreement(fields, "Give every process the same callbacks and model.")

    def check_progress(self) -> None:
        """Raises in every process if one has left weights out that others took in, since theirs held no NaN."""
        check_agreement(
            {name: value for average in self.averages for name, value in average.progress().items()},
            "A NaN or an infinity in the weights of one process alone makes averages that do not fit together. Resume"
            " from an earlier checkpoint with a lower learning rate or clipped gradients.",
        )

    def look(self) -> None:
        """Looks the live tensors up, and tells the averages if any was replaced, added, removed, frozen or unfrozen."""
        if self.swapped_out:
            return  # what is assigned anew while others are in place goes with them
        if self._is_sharded:
            reshard(self.module)
        changed = self.inventory.refresh()
        if self._watches_training:
            trained = tuple([parameter.requires_grad for parameter in self.inventory.parameters.values()])
            changed, self._trained = changed or trained != self._trained, trained
        if changed:
            for _, average in self._counted:  # those that have begun
                average.look_again()

    @property
    def _is_sharded(self) -> bool:
        return any(average.is_sharded for average in self.averages)

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._watches_training and not self.busy:
            self.look()  # an average of what was unfrozen starts where it does

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self.busy or self.trainer._checkpoint_connector._loaded_checkpoint:
            return
        # Fused optimizers are called even if the gradient scaler found an infinity, and skip the step themselves.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and bool(found_inf):
            return
        wanting: list[tuple[Published, Moment]] = []
        for counted, average in self._counted:
            if counted is optimizer:
                average.steps += 1
                average.accepted = None  # what was chosen at the end of an earlier fit
                moment = Moment(average.steps, self.trainer.current_epoch)
                if average.wants(moment):
                    wanting.append((average, moment))
        if not wanting:
            return
        self.look()
        taken: dict[str, Tensor] = {}
        for average, _ in wanting:
            taken |= average.checked
        nonfinite = weights.nonfinite(taken)  # all share one look
        for average, moment in wanting:
            average.take_in(moment, nonfinite)

    def accept(self, average: "Published", share: float) -> None:
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

    def continue_fit(self, average: "Published") -> None:
        """Says how the fit goes on from an earlier one."""
        how = f"; {self._went_on}" if self._went_on and average is self.primary else ""
        rank_zero_info(f"{average.title} goes on with its average of {average.updates} updates{how}.")

    def finish(self) -> None:
        """After the last step: measures and saves each final set, and makes the primary's the model's weights."""
        self.check_progress()
        for average in self.averages:
            average.note_the_end()
        ready = [average for average in self.averages if average.ready]
        for callback in filter(_judges, self.trainer.callbacks if ready else []):
            callback.consider(self)
        self.validation.measure_final(ready)
        for average in ready:
            average.final_metrics = self.validation.metrics_of(average.name)
            average.final_path = self._write_final(average)
            if average.final_path is not None:
                rank_zero_info(f"{average.title}: merged weights are in {average.final_path}")
        self._publish()

    def _write_final(self, average: "Published") -> str | None:
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
                average.recalibrate()  # the last chance: after the fit there is nothing to measure on
        if not self.primary.ready:
            return
        published = weights.copies(self.set_of(self.primary))
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
        if self._hooks and self.ending is None and not self.interrupted:
            self._publish()  # a finished run was resumed: Lightning trains nothing and calls no `on_train_end`
        original()
        for hook in self._hooks:
            hook.remove()
        for average in self.averages:
            average.to_host()
        if self.ending is not None:
            self.ending.raw = weights.to_devices(self.ending.raw, torch.device("cpu"))
        self.patches.undo()

    # ---- which weights

    def raw(self, average: "Published") -> Weights:
        """The raw tensors of the names an average merges."""
        set_aside = average.ending.raw if average.ending is not None else self.swapped_out
        return {name: set_aside.get(name, tensor).detach() for name, tensor in average.tensors.items()}

    def under_every_name(self, tensors: Weights) -> Weights:
        """Tensors under each name that the module has for them."""
        return self.inventory.under_every_name(tensors)

    @property
    def singular_vectors(self) -> set[str]:
        """Names of the buffers that spectral normalisation iterates."""
        if self._vectors is None or self._vectors[0] != self.inventory.version:
            self._vectors = self.inventory.version, singular_vectors(self.module)
        return self._vectors[1]

    def fit_vectors_(self, average: "Published", tensors: Weights) -> None:
        """Iterates the vectors of spectral normalisation among the tensors, until they fit the weights among them."""
        if names := self.singular_vectors & tensors.keys():
            fitted = weights.copies(weights.like(tensors, average.tensors))
            with self.in_place(fitted):
                iterate_(self.module)
            weights.copy_({name: tensors[name] for name in names}, fitted)

    @property
    def set_aside(self) -> Mapping[str, Tensor]:
        """All raw tensors that others are in the place of."""
        return self.swapped_out if self.ending is None else {**self.swapped_out, **self.ending.raw}

    def set_of(self, average: "Published") -> Weights:
        """The merged tensors of an average as they are published."""
        if not self.interrupted:
            average.recalibrate()
        return self.publishable(average, average.published_weights() or {})

    def publishable(self, average: "Published", tensors: Mapping[str, Tensor]) -> Weights:
        """Any tensors in the place of an average's: in the live dtype, buffers equal on all ranks."""
        live = average.tensors
        published = weights.like({name: t for name, t in tensors.items() if name in live}, live)
        # Parameters that a forward pass writes to are handed out as copies.
        published |= weights.copies({name: published[name] for name in written_in_eval(self.module) & published.keys()})
        # So are buffers: a DDP forward broadcasts into them, and they are small.
        buffers = weights.copies({name: published[name] for name in average.buffer_names if name in published})
        if not self.interrupted:
            weights.mean_over_ranks_(buffers)
        return {**published, **buffers}

    @contextmanager
    def swapped(self, average: "Published", merged: Weights | None = None) -> Iterator[None]:
        """Merged weights in place of the raw ones, for the length of a block, whatever happens in it."""
        self.look()
        with self.in_place(self.set_of(average) if merged is None else merged):
            yield

    @contextmanager
    def raw_in_place(self, average: "Published") -> Iterator[None]:
        """Raw weights in place again within a block of merged ones."""
        with self.in_place(dict(self.swapped_out)):
            yield

    @contextmanager
    def in_place(self, tensors: Mapping[str, Tensor]) -> Iterator[Weights]:
        """Tensors in the place of the live ones of their names for the length of a block, whatever happens in it.

        Yields what was there before, which fills as the exchange goes on.
        """
        live, ties = self.inventory.tensors, self.inventory.ties
        before: Weights = {}
        outer = self.swapped_out
        # Of nested blocks the outermost knows the raw weights.
        self.swapped_out = ChainMap(outer, before)  # type: ignore[arg-type]
        reshard(self.module)
        try:
            weights.exchange(live, tensors, before, ties)
            yield before
        except BaseException:
            reshard(self.module, interrupted=True)
            raise
        finally:
            reshard(self.module)
            if not outer:
                self.inventory.put_objects_back()
            weights.put_back(live, before, ties)
            self.swapped_out = outer


def _judges(callback: Any) -> bool:
    """Whether it looks at the averages at the end of a fit: a doctor, or a judge of what is published."""
    return hasattr(callback, "consider")


def averages_of(trainer: Any) -> "list[Published]":
    """The averages of a Trainer in the order of its callback list.

    Raises:
        ValueError: If two share a name, one would decide on merged figures, or another callback that exchanges weights
            is among the callbacks.
    """
    ours = [callback for callback in trainer.callbacks if hasattr(callback, "merged_weights")]
    names = [average.name for average in ours]
    for average in ours:
        if names.count(average.name) > 1:
            raise ValueError(
                f"`name` must be unique in a Trainer, but {names.count(average.name)} averages are called"
                f" {average.name!r}. Give one another: {type(average).__name__}(name='{average.name}2')."
            )
        if average.monitor is not None and (other := average.monitor.partition("/")[0]) in names:
            raise ValueError(
                f"{average.title} decides on how the raw weights do, but `monitor={average.monitor!r}` is a metric of"
                f" the average {other!r}. Name the metric without that prefix."
            )
    for callback in trainer.callbacks:
        if any(cls.__name__ == "ModelPruning" for cls in type(callback).__mro__):
            raise ValueError(
                f"ModelPruning puts `weight_orig` and `weight_mask` in the place of `weight` in mid-fit, and"
                f" {ours[0].title} would average what is not there any more. Prune before the fit with"
                " `torch.nn.utils.prune`, whose parameters and masks are averaged and kept, or after it."
            )
        if callback not in ours and _OTHER_MERGERS & {cls.__name__ for cls in type(callback).__mro__}:
            raise ValueError(
                f"{type(callback).__name__} and {ours[0].title} both put other weights into the model, and would save"
                " and measure each other's. Keep one; several averages of lightning-merge work side by side."
            )
    return ours
