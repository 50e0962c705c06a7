"""The callback that every published average is: it hands Lightning's hooks on to the Trainer's one session."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Unpack

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_merge import calibration, weights
from lightning_merge._ranks import several
from lightning_merge.callbacks._lightning._internals import launcher_of
from lightning_merge.callbacks._lightning._recalibrate import prepare, recalibrate
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._run import restore_loader_position
from lightning_merge.callbacks._publication._average import Average, Ending, Validate
from lightning_merge.callbacks._publication._homecoming import Traveller
from lightning_merge.callbacks._publication._options import AverageOptions, known
from lightning_merge.callbacks._publication._session import Publisher
from lightning_merge.diagnostics import between
from lightning_merge.shards import sharded_tensors
from lightning_merge.spectral import iterate_
from lightning_merge.weights import Weights

__all__ = ["Published", "Validate"]


class Published(Traveller, Average, Callback):
    """A callback whose merged weights are measured, saved and left in the model by the Trainer's one publisher.

    Args:
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files; unique in the Trainer.
        optimizer: Index of the optimizer whose applied steps are counted; at least 0.
        options: ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``AverageOptions``.

    Attributes:
        steps: Applied optimizer steps counted so far.
        accepted: How far from the raw weights (0) to the merged ones (1) the published weights lie, if
            ``AcceptIfBetter`` chose them at the end of a fit.
        update_window: First and last applied step whose weights were taken in, where there is a first one.
        final_path: The file written at the end of the fit, if checkpointing is on.
        final_metrics: Metrics measured on the final merged weights, under plain names.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        validate: Validate,
        name: str,
        optimizer: int,
        **options: Unpack[AverageOptions],
    ) -> None:
        super().__init__(validate, name, optimizer, **known(options, AverageOptions, self))
        self._buffers: Weights = {}  # copies of the buffers that are published as they were at the last update
        self._calibrated_at: list[int] | None = None  # `version` when the statistics in `_buffers` were measured
        self._recent: RecentBatches | None = None
        self._resumed = False
        self._publisher: Publisher | None = None
        self._module: LightningModule | None = None
        self.expect()
        self._came_home: Weights | None = None  # the merged weights of a fit in processes of its own

    @property
    def _session(self) -> Publisher:
        """The session of the fit that it is part of, or was last."""
        if self._publisher is None:
            raise RuntimeError(f"{self.title} has not been part of a fit yet.")
        return self._publisher

    # ---- what there is

    def merged_weights(self) -> Weights | None:
        """The merged parameters and buffers by canonical name, in the average's precision; ``None`` if there are none.

        A tensor that has several names in the module is there under each of them, so that a plain module of the same
        class takes them. They are the stored tensors: clone before writing. Of sharded ones it is the part that this
        process holds.
        """
        merged = self.merged()
        if self._publisher is None and self.ending is not None:  # the fit was in processes of its own
            return self._came_home if self._came_home is not None else merged
        if merged is None or self._publisher is None:
            return merged
        return self._publisher.under_every_name({**self.shared, **merged})

    def published_weights(self) -> Weights | None:
        """The merged weights, or what ``AcceptIfBetter`` chose in their place."""
        merged = self.merged()
        if merged is None or self.accepted is None or self._publisher is None:
            return merged
        raw = self._publisher.apart.of_first(self._publisher.raw(self))
        merged = weights.to_devices(merged, {name: tensor.device for name, tensor in raw.items()})
        return {**between(raw, merged, self.accepted), **self._buffers} if self.accepted else raw

    def raw_weights(self) -> Weights:
        """The weights that training works on, by canonical name: live during a fit, set aside after it.

        A tensor that has several names in the module is there under each of them. Of sharded ones it is the part that
        this process holds.
        """
        if self._publisher is None and self.ending is not None:
            return dict(self.ending.raw)
        if self._publisher is None:
            raise RuntimeError(f"{self.title} has not been part of a fit yet, so there are no raw weights.")
        return self._publisher.under_every_name({**self.shared, **self._publisher.raw(self)})

    @property
    def owns_plain_names(self) -> bool:
        """Whether validation logs its metrics under plain names, as ``val/acc``, once it is ready."""
        return self._publisher is not None and self._publisher.validation.owner is self

    # ---- a fit begins and ends

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work and, for a fit, takes hold of the save and load paths."""
        if stage == "fit":
            if launcher_of(trainer) is not None and self.ending is not None:
                self._own_memory()
            self._resumed = False
            self._publisher = Publisher.attach(trainer, pl_module)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Learns the module."""
        self._module = pl_module
        if not self.works_on_shards and (sharded := sharded_tensors(pl_module)):
            raise ValueError(
                f"{self.title} needs whole parameters, and `{next(iter(sharded))}` is sharded. Use `strategy='ddp'`, or"
                " an average (EMA, SWA, LAWA, SWAD), which works on parts."
            )
        if not 0 <= self.optimizer < len(trainer.optimizers):
            raise ValueError(
                f"`optimizer` of {self.title} must be the index of one of the {len(trainer.optimizers)} optimizers, got"
                f" {self.optimizer}."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hands a resumed loader its position, if Lightning has not."""
        restore_loader_position(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last average of the list measures, saves and publishes for all of them."""
        if self._session.averages[-1] is self:
            self._session.finish()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """During a fit the save path is wrapped, which covers weights-only files too; this is for a save after it."""
        publisher = self._publisher
        if publisher is not None and publisher.is_over and publisher.primary is self:
            publisher.checkpoints.label_after_fit(checkpoint)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Raw weights are live whatever happens; only a fit that had already published needs them put back."""
        if self._publisher is None:
            return
        self._publisher.interrupt()
        if several() and self._publisher.primary is self:
            exception.add_note(
                "lightning-merge: raw weights are in place in this process. If it lost the connection to another"
                " process, that one failed first, and its error is the cause."
            )

    # ---- a fit in processes of its own

    def luggage(self) -> dict[str, Any]:
        """What a full file would keep, and what the fit left."""
        session, merged = self._session, self.merged_weights()
        ending = session.ending
        published = None if ending is None else {**(session.primary.published_weights() or {}), **ending.buffers}
        return {
            "saved": self.save(),
            "label": self.label(),
            "merged": merged,
            "raw": None if ending is None else {**ending.raw, **self.raw_weights()},
            "published": published,
            "attributes": {name: getattr(self, name) for name in ("accepted", "final_path", "final_metrics")},
        }

    def _own_memory(self) -> None:
        """Spawned processes are handed tensors in memory that all of them share, and each would write to it."""
        self.load(copy.deepcopy(self.save()), self.label())
        if self.ending is not None:
            ending = self.ending
            self.ending = Ending(weights.copies(ending.raw), ending.primary, weights.copies(ending.buffers))

    def come_home(self, luggage: dict[str, Any]) -> None:
        """As from a file, with the raw weights set aside as after a fit."""
        self._publisher = None
        self.load(luggage["saved"], luggage["label"])
        for name, value in luggage["attributes"].items():
            setattr(self, name, value)
        self._came_home, self._resumed = luggage["merged"], False
        if luggage["raw"] is not None:
            self.ending = Ending(luggage["raw"], None, luggage["published"])

    # ---- for the session

    def recalibrate(self) -> None:
        """Makes the buffers fit the merged weights, unless that was done already: BatchNorm statistics are measured,
        singular vectors of spectral normalisation iterated."""
        publisher = self._publisher
        if publisher is None or self._calibrated_at == list(self.version) or self.accepted == 0:
            return  # accepted raw weights keep the statistics that they were trained with
        recent = self._recent if self._recent is not None and self._recent.batches else None
        vectors = publisher.singular_vectors & self._buffers.keys()
        if recent is None and not vectors:
            return
        merged = weights.like({**(self.published_weights() or {}), **weights.copies(self._buffers)}, self.tensors)
        with publisher.swapped(self, merged):
            iterate_(publisher.module)
            fresh = {} if recent is None else recalibrate(publisher.trainer, publisher.module, self.name, recent)
            fresh |= weights.copies({name: publisher.inventory.buffers[name] for name in vectors})
        weights.copy_({name: self._buffers[name] for name in fresh}, fresh)
        self._calibrated_at = list(self.version)

    @property
    def measures_statistics(self) -> bool:
        """Whether BatchNorm statistics are measured again when it is published."""
        return self._recent is not None

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The merged weights in place of the live ones for the length of a block; the live ones if there are none."""
        tensors = weights.like(self.merged() or self._session.raw(self), self.tensors)
        # Copies of the buffers: a forward pass may write to them, and they are small.
        buffers = weights.copies({name: tensors[name] for name in self.buffer_names})
        with self._session.swapped(self, {**tensors, **buffers}):
            yield

    def forget_statistics(self) -> None:
        """BatchNorm statistics are measured again before the next publication, where there are batches to."""
        self._calibrated_at = None

    def statistics(self, candidate: Weights) -> Weights:
        """BatchNorm statistics of any weights in its place, on the kept batches; empty without such."""
        if self._recent is None or not self._recent.batches:
            return {}
        with self._session.swapped(self, weights.like(candidate, self.tensors)):
            return recalibrate(self._session.trainer, self._session.module, self.name, self._recent)

    def _keep_recent_batches(self) -> None:
        """From here on batches are kept, if there are statistics to measure again."""
        module = self._session.module
        if not calibration.batch_norm_layers(module):
            return
        self._recent = self._recent or RecentBatches()
        self._recent.is_needed = self._session.trains_statistics
        prepare(self._session.trainer, module, self.title, self._recent)
