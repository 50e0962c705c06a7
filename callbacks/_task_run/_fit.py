"""One fit of one task on the way: how it starts, what it keeps, and what it learns of the head."""

import sys
from typing import Any, final

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_merge import calibration, weights
from lightning_merge.callbacks._lightning._on_one_process import on_one_process
from lightning_merge.callbacks._lightning._recalibrate import prepare
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._task_run._files import TaskSaved
from lightning_merge.callbacks._task_run._head_search import HeadSearch, guessed_head
from lightning_merge.callbacks._task_run._heads import Head, put_head
from lightning_merge.callbacks._task_run._settings import Settings
from lightning_merge.callbacks._task_run._start import known_head, opened
from lightning_merge.callbacks._task_run._statistics import measures
from lightning_merge.callbacks._task_run._statistics import prepare as measuring
from lightning_merge.callbacks._task_run._stored_samples import StoredSamples, reaching
from lightning_merge.callbacks._task_run._task import classes_of, title_of


@final
class Fit:
    """A task from the moment that its weights are in place until it is part of the stream.

    Args:
        trainer: The Trainer of the fit.
        module: The module, built; the weights that the task starts from are put into it.
        settings: Of the stream.
        left_off: Whether the module was left by a fit of this task that was interrupted.

    Attributes:
        settings: Of the stream.
        names: The parameters that are merged.
        base: Their base.
        task: The task's number in its stream.
        title: What the data module calls it.
        classes: Of the task, if they have rows of the head.
        head: The head; of a first task known once a batch was looked at.
        start_head: What it was when the task began, where it was known then.
        recent: Batches kept for BatchNorm statistics, if those are measured again, and for what tasks are weighed by.
        recalibrates: Whether BatchNorm statistics are measured again.
        measured_on: The same batches, if statistics of the task are measured.
        samples: Samples stored for the head, if any are.
        resumed: Whether the fit goes on from a checkpoint.
        trained_before: Which parameters required gradients when it began.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, settings: Settings, left_off: bool) -> None:
        self.settings = settings
        self.classes = classes_of(trainer, settings.heads)
        start = on_one_process(trainer, lambda: opened(trainer, module, settings, self.classes, left_off))
        self.task, self.base, self.names = start.done, start.base, start.names
        self.title = title_of(trainer, self.task, start.titles)
        self.head = known_head(module, settings, start.head)
        self._search: HeadSearch | None = HeadSearch(self.head, settings.head is not None, bool(self.task))
        if self.head is not None:
            if settings.samples_per_class:
                self.head.layer(module)  # there is one
            if settings.head is not None and self.classes is None and settings.lora is None:
                self._search = None  # there is nothing to find out
        self.trained_before = {name: p.requires_grad for name, p in weights.named_parameters(module).items()}
        self.recent: RecentBatches | None = None
        self.recalibrates = False
        self.measured_on: RecentBatches | None = None
        self.samples: StoredSamples | None = None
        self.resumed = False
        self._is_first = True
        self._is_reached = False  # whether what the head is called on was looked at
        live = weights.named_tensors(module)
        with torch.no_grad():
            for name, tensor in start.tensors.items():
                put_head(live, name, tensor)
        self.start_head = weights.copies({name: live[name] for name in (self.head.names if self.head else ())})
        if settings.lora is not None:
            settings.lora.attach(module, self.names)
        if self.head is not None:
            self._free_or_freeze(module, self.head)
        self._there = set(weights.named_parameters(module))
        self._frozen = self._frozen_by_name(module)

    def _frozen_by_name(self, module: LightningModule) -> dict[str, nn.Parameter]:
        """What the selection names and is in no vector, since it was frozen in the first task and is now."""
        if not self.task or self.settings.lora is not None:
            return {}
        known = {*self.names, *(self.head.names if self.head else ())}
        live = weights.named_parameters(module)
        named = self.settings.named(module) - known
        return {n: parameter for n, parameter in live.items() if n in named and not parameter.requires_grad}

    def _free_or_freeze(self, module: LightningModule, head: Head) -> None:
        for name, parameter in weights.named_parameters(module).items():
            if name in head.names and parameter.is_floating_point():
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
        if self.settings.lora is not None:
            self.settings.lora.refuse_untrained(trainer.optimizers)
        if self.settings.selection.buffers == "recompute" and calibration.batch_norm_layers(module):
            self.recent, self.recalibrates = self.recent or RecentBatches(), True
            prepare(trainer, module, "ContinualMerging", self.recent)
        if (kind := measures(self.settings.store.combiner, self.title)) is not None:
            self.recent = self.recent or RecentBatches()
            self.measured_on = measuring(trainer, module, self.settings.store.combiner, kind, self.names, self.recent)
        if self.settings.samples_per_class and self.samples is None:
            self.samples = StoredSamples(self.settings.samples_per_class)
        if self._search is None and self.head is not None:
            self._announce(self.head)

    def _announce(self, head: Head) -> None:
        settings = self.settings
        rank_zero_info(
            f"ContinualMerging: {self.title} is task {self.task} of the bank {settings.store.folder}, starts from"
            f" {'the base' if not self.task else settings.store.init_from}; {len(self.names)} tensors are merged by"
            f" {settings.store.combiner}, {head.describe()}."
        )

    def begin_batch(self, trainer: Trainer, module: LightningModule, batch: Any) -> None:
        """Looks for the head with the first batch, and copies what is kept of each before the step can change it.

        Raises:
            ValueError: If one cannot tell the head, or it cannot be what it is taken for.
        """
        for name, parameter in self._frozen.items():
            if parameter.requires_grad:
                raise self.settings.trained_later(name)
        if self._is_first:
            self._refuse_late(module)
        if self._search is not None and not self._search.is_tried and self._search.attempt(trainer, module, batch):
            self._settle(trainer, module, self._search)
        if self.recent is not None:
            self.recent.hold(batch)
        if self.samples is not None and trainer.is_global_zero:
            self.samples.take(batch, self.classes or range(self._rows(module)))
            if not self._is_reached and self.samples.by_class and self.head is not None:
                # A head that cannot be trained alone is better refused now than when the task is trained.
                self._is_reached = True
                reaching(trainer, module, self.head.layer(module), next(iter(self.samples.by_class.values())))

    def see_loss(self, module: LightningModule, loss: Tensor) -> None:
        """Looks at a loss of the first batch, where the step could not be tried before it trained."""
        if self._search is not None and loss.grad_fn is not None:
            self._search.look(module, loss)

    def end_batch(self, trainer: Trainer, module: LightningModule) -> None:
        """Keeps the batch that was trained on."""
        if self._is_first:
            self._is_first = False
            self._refuse_late(module)
        if self._search is not None:
            self._settle(trainer, module, self._search)
        if self.recent is not None:
            self.recent.keep()

    def settle(self, module: LightningModule) -> Head:
        """The head, at the end of a fit that may have trained no batch."""
        if self.head is None:
            self.head = Head(guessed_head(module), self.settings.heads)
            self.names = [name for name in self.names if name not in self.head.names]
        return self.head

    def _settle(self, trainer: Trainer, module: LightningModule, search: HeadSearch) -> None:
        settings = self.settings
        if settings.lora is not None:
            settings.lora.refuse_unused(name for graph in search.graphs for name in graph.used)
        found = on_one_process(
            trainer, lambda: search.settled(module, settings.heads, settings.needs_head_early, self.classes)
        )
        self._search = None
        if self.head is None:
            self.names = settings.merged(module, found.names)
            self._free_or_freeze(module, found)
            if settings.samples_per_class:
                found.layer(module)  # there is one
        self.head = found
        self._announce(found)

    def _rows(self, module: LightningModule) -> int:
        live = weights.named_parameters(module)
        rows = [len(live[name]) for name in (self.head.names if self.head else ()) if live[name].dim() > 1]
        return min(rows, default=sys.maxsize)  # as long as the head is not known

    def _refuse_late(self, module: LightningModule) -> None:
        """Checks, around the first batch, that no layer was made after the base was taken.

        Raises:
            ValueError: If one was.
        """
        if late := [name for name in weights.named_parameters(module) if name not in self._there]:
            raise ValueError(
                f"`{late[0]}` was made after the fit began, so it has no base and cannot be merged: make layers in"
                " `__init__`, `setup` or `configure_model`."
            )

    # ---- files

    def saved(self) -> TaskSaved:
        """What a checkpoint needs so that the resumed task ends bit for bit alike."""
        recent = [] if self.recent is None else self.recent.saved()
        samples = None if self.samples is None else dict(self.samples.by_class)
        head = None if self.head is None else list(self.head.names)
        return TaskSaved("raw", self.task, self.title, recent, samples, head)

    def resume(self, saved: TaskSaved, module: LightningModule) -> None:
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
        if self.head is None and saved.head is not None:
            self.head = Head(saved.head, self.settings.heads)
            self.names = self.settings.merged(module, saved.head)
            self._search = HeadSearch(self.head, False, False)
        if saved.recent:
            self.recent = RecentBatches.restored(saved.recent)
        if self.settings.samples_per_class:
            self.samples = StoredSamples(self.settings.samples_per_class, saved.samples)

    def leave(self, module: LightningModule) -> None:
        """The module as it was given: no adapters, and what required gradients does."""
        lora = self.settings.lora
        if lora is not None and lora.is_attached:
            for name, product in lora.detach(module).items():
                live = weights.named_tensors(module)
                live[name].data += product.to(live[name])
        for name, parameter in weights.named_parameters(module).items():
            if parameter.is_floating_point() or parameter.is_complex():
                parameter.requires_grad_(self.trained_before.get(name, True))
