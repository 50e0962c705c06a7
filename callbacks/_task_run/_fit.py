"""One fit of one task: how it starts, what it keeps on the way, and how its vector enters the stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from lightning_merge import calibration, weights
from lightning_merge._checks import instance
from lightning_merge.callbacks._lightning._on_one_process import on_one_process
from lightning_merge.callbacks._lightning._recalibrate import prepare, recalibrate
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._task_run._files import TaskSaved
from lightning_merge.callbacks._task_run._heads import Head, classes_of, title_of
from lightning_merge.callbacks._task_run._low_rank import LowRank
from lightning_merge.callbacks._task_run._store import Store, refuse_other_model
from lightning_merge.callbacks._task_run._stored_samples import StoredSamples, reaching
from lightning_merge.combiners import add_vector, task_vector
from lightning_merge.combiners._vectors import refuse_unfit
from lightning_merge.continual import Bank
from lightning_merge.selections import Selection
from lightning_merge.weights import Weights


@final
@dataclass(frozen=True)
class Settings:
    """What is the same for all tasks of a stream.

    Attributes:
        store: The stream's folder.
        head: The head of its model.
        selection: Which other parameters are merged, and what becomes of buffers.
        lora: Adapters that are trained in the place of weights, if any are.
        samples_per_class: Samples of a class that are stored; 0 for none.
    """

    store: Store
    head: Head
    selection: Selection
    lora: LowRank | None
    samples_per_class: int

    def names(self, module: nn.Module) -> list[str]:
        """The parameters that are merged.

        Raises:
            ValueError: If there are none, or one cannot be merged.
        """
        merged = [name for name in self.selection.parameters(module) if name not in self.head.names]
        names = list(LowRank.targets(module, merged)) if self.lora else merged
        if not names:
            raise ValueError(f"there is nothing to merge: {self.selection} leaves only the head, {self.head.names}.")
        live = weights.named_parameters(module)
        refuse_unfit({name: live[name] for name in names}, "of the model")  # now, not after the task
        return names


@final
@dataclass(frozen=True)
class Start:
    """Where the stream is: tasks done, the base of what is merged, and the tensors that the next task starts from."""

    done: int
    base: Weights
    tensors: Weights


@final
class Fit:
    """A task from the moment that its weights are in place until it is part of the stream.

    Args:
        trainer: The Trainer of the fit.
        module: The module; the weights that the task starts from are put into it.
        settings: Of the stream.
        left_off: Whether the module was left by a fit of this task that was interrupted.

    Attributes:
        names: The parameters that are merged.
        task: The task's number in its stream.
        title: What the data module calls it.
        recent: Batches kept for BatchNorm statistics, if those are measured again.
        samples: Samples stored for the head, if any are.
        resumed: Whether the fit goes on from a checkpoint.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, settings: Settings, left_off: bool) -> None:
        head, lora = settings.head, settings.lora
        if settings.samples_per_class:
            head.layer(module)  # there is one
        self.settings = settings
        self.names = settings.names(module)
        self._trained_before = {name: p.requires_grad for name, p in weights.named_parameters(module).items()}
        start = on_one_process(trainer, lambda: _open(trainer, module, settings, self.names, left_off))
        self.task, self._base = start.done, start.base
        self.title = title_of(trainer, self.task)
        self.recent: RecentBatches | None = None
        self.samples: StoredSamples | None = None
        self.resumed = False
        live = weights.named_tensors(module)
        for name, tensor in start.tensors.items():
            with torch.no_grad():  # of a head that has grown, the rows there were
                live[name][: len(tensor)].copy_(tensor) if tensor.dim() else live[name].copy_(tensor)
        self._start_head = weights.copies({name: live[name] for name in head.names})
        if lora is not None:
            lora.attach(module, self.names)
        for name, parameter in weights.named_parameters(module).items():
            if name in head.names:
                parameter.requires_grad_(head.mode != "freeze")

    # ---- on the way

    def get_ready(self, trainer: Trainer, module: LightningModule) -> None:
        """Gets ready to keep batches.

        Raises:
            ValueError: If the Trainer has trained all its epochs already.
        """
        done, most = trainer.fit_loop.epoch_progress.current.completed, trainer.fit_loop.max_epochs
        if not self.resumed and most is not None and 0 <= most <= done:
            raise ValueError(
                f"`max_epochs` of this Trainer must be more than the {done} epochs it has trained already, got {most}:"
                f" {self.title} would have an empty task vector. Use a new Trainer for each task."
            )
        if self.settings.selection.buffers == "recompute" and calibration.batch_norm_layers(module):
            self.recent = self.recent or RecentBatches()
            prepare(trainer, module, "ContinualMerging", self.recent)
        if self.settings.samples_per_class and self.samples is None:
            self.samples = StoredSamples(self.settings.samples_per_class)

    def hold(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Copies what is kept of a batch, before the step can change it."""
        if self.recent is not None:
            self.recent.hold(batch)
        if self.samples is not None and trainer.is_global_zero:
            is_first = not self.samples.by_class
            self.samples.take(batch)
            if is_first:  # a head that cannot be trained alone is better refused now than when the task is trained
                reaching(trainer, module, self.settings.head.layer(module), next(iter(self.samples.by_class.values())))

    def saved(self) -> TaskSaved:
        """What a checkpoint needs so that the resumed task ends bit for bit alike."""
        recent = [] if self.recent is None else self.recent.saved()
        samples = None if self.samples is None else dict(self.samples.by_class)
        return TaskSaved("raw", self.task, self.title, recent, samples)

    def resume(self, saved: TaskSaved) -> None:
        """Goes on with a task in progress, and with no other.

        Raises:
            ValueError: If the file is of another task, or of one that is merged.
        """
        if saved.holds == "merged" or saved.task != self.task:
            raise ValueError(
                f"this checkpoint is of {saved.title}, task {saved.task} of a stream, and the bank"
                f" {self.settings.store.folder} goes on with task {self.task}. Resume from a file of that task, or fit"
                " the next one without `ckpt_path`."
            )
        self.resumed = True
        if saved.recent:
            self.recent = RecentBatches.restored(saved.recent)
        if self.settings.samples_per_class:
            self.samples = StoredSamples(self.settings.samples_per_class, saved.samples)

    # ---- the end

    def leave(self, module: LightningModule) -> None:
        """The module as it was given: no adapters, and what required gradients does."""
        lora = self.settings.lora
        if lora is not None and lora.is_attached:
            for name, product in lora.detach(module).items():
                live = weights.named_tensors(module)
                live[name].data += product.to(live[name])
        for name, parameter in weights.named_parameters(module).items():
            parameter.requires_grad_(self._trained_before.get(name, True))

    def finish(self, trainer: Trainer, module: LightningModule) -> None:
        """Takes the task in: its vector into the bank, the merged model into the module."""
        store, head_of = self.settings.store, self.settings.head
        raw, vector = self._trained(module)
        live = weights.named_tensors(module)
        before: dict[str, Weights] = {}
        bank = store.bank(self._base)

        def merge() -> Weights:
            before.update(store.stream.load(self.task) if self.task else {})
            self._refuse_empty(raw, store.start(bank, self._base, before), len(vector))
            merged = bank.preview(vector, task=self.title)
            return add_vector(self._base, merged) | self._buffers(raw, before.get("buffers", {}), module)

        published = on_one_process(trainer, merge)
        weights.copy_({name: live[name] for name in published}, published)
        head = head_of.joined(module, self._start_head, classes_of(trainer))
        weights.copy_({name: live[name] for name in head}, head)
        if self.recent is not None and self.recent.batches:
            fresh = recalibrate(trainer, module, "ContinualMerging", self.recent)
            weights.copy_({name: live[name] for name in fresh}, fresh)
        samples: dict[int, Tensor] = {}
        if self.samples is not None:
            stored = {int(label): kept for label, kept in before.get("samples", {}).items()}
            samples = stored | self.samples.by_class
            head = on_one_process(trainer, lambda: head_of.calibrated(trainer, module, head, samples))
            weights.copy_({name: live[name] for name in head}, head)
        parts = self._parts(module, before, raw, head, samples, classes_of(trainer))
        on_one_process(trainer, lambda: self._keep(bank, vector, parts))
        self.leave(module)

    def _trained(self, module: LightningModule) -> tuple[Weights, Weights]:
        """The raw weights that the task ends with, and its vector."""
        products = self.settings.lora.detach(module) if self.settings.lora else {}
        live = weights.named_tensors(module)
        raw = weights.copies({name: live[name] for name in (*self.names, *weights.named_buffers(module))})
        # The base as it was trained from: in half precision, its rounding is no part of what the task learned.
        base = {name: self._base[name].to(live[name]) for name in self.names}
        vector = products or task_vector({name: raw[name] for name in self.names}, base)
        vector = {name: tensor.contiguous() for name, tensor in vector.items()}  # channels-last is no matter of merging
        if products:
            raw |= {name: raw[name] + products[name].to(raw[name]) for name in self.names}
        return raw, vector

    def _refuse_empty(self, raw: Weights, start: Weights, count: int) -> None:
        if all(torch.equal(raw[name], start[name].to(raw[name])) for name in self.names):
            raise ValueError(
                f"{self.title} would have an empty task vector: training moved none of the {count} tensors that"
                " are merged. Is the learning rate 0, or was every step skipped?"
            )

    def _buffers(self, raw: Weights, before: Weights, module: LightningModule) -> Weights:
        own = {name: raw[name] for name in weights.named_buffers(module)}
        if self.settings.selection.buffers == "average":
            for name, mean in before.items():
                if weights.is_averaged(mean):
                    own[name] = torch.lerp(mean.to(own[name]), own[name], 1 / (self.task + 1))
        return own

    def _parts(
        self,
        module: LightningModule,
        before: dict[str, Weights],
        raw: Weights,
        head: Weights,
        samples: dict[int, Tensor],
        classes: Sequence[int] | None,
    ) -> dict[str, Weights]:
        """What no vector holds, as it is after the task."""
        live = weights.named_tensors(module)
        known = {*self.names, *self.settings.head.names}
        # Parameters that train but are neither merged nor the head's stay as they are live.
        others = [n for n in weights.named_parameters(module) if n not in known and self._trained_before.get(n, True)]
        # What earlier tasks left that this one does not replace: their heads, and which classes they had.
        parts = {part: tensors for part, tensors in before.items() if part.startswith(("head", "classes"))}
        parts |= {
            "head": head,
            "buffers": {name: live[name] for name in weights.named_buffers(module)},
            "other": {name: live[name] for name in others},
            "samples": {str(label): kept for label, kept in samples.items()},
        }
        if self.settings.head.mode == "per_task":
            parts[f"head{self.task}"] = head
        if self.settings.store.init_from == "last":
            parts["last"] = raw
        if classes is not None:
            parts["classes"] = parts.get("classes", {}) | {self.title: torch.tensor(classes)}
        return parts

    def _keep(self, bank: Bank, vector: Weights, parts: dict[str, Weights]) -> None:
        stream = self.settings.store.stream
        stream.save(self.task + 1, parts)
        bank.add(vector, task=self.title)  # from here on the task is part of the stream
        stream.forget_before(self.task + 1)


def _open(trainer: Trainer, module: LightningModule, settings: Settings, names: list[str], left_off: bool) -> Start:
    """Finds out where the stream is, before anything is trained.

    Raises:
        ValueError: If its model or base is another, or it has had the task's classes.
    """
    instance("module", module, nn.Module, "a module")
    store, head = settings.store, settings.head
    bank, stream, live = store.bank(), store.stream, weights.named_tensors(module)
    done = bank.added
    # A base of a first task that was never taken in is of use only to go on with that task.
    goes_on = left_off or trainer.ckpt_path is not None
    if not done and not (stream.has_base and goes_on):
        stream.save_base(live)
    base = stream.base()
    refuse_other_model({name: live[name] for name in names}, base, head.names)
    merged_base = {name: base[name] for name in names}
    bank = store.bank(merged_base)  # refuses a file of another base before anything is trained
    if not left_off:
        store.refuse_other_base(live, merged_base, add_vector(merged_base, bank.result() or {}))
    state = stream.load(done) if done else {}
    head.refuse_known_classes(classes_of(trainer), state.get("classes", {}))
    tensors = {name: base[name] for name in weights.named_buffers(module) if name in base}
    tensors |= store.start(bank, merged_base, state) | state.get("other", {})
    return Start(done, merged_base, tensors | head.start(base, state.get("head", {}), live))
