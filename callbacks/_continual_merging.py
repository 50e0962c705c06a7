"""Continual learning by merging: a task vector per fit, and the merged model of all tasks so far after each."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_merge import calibration, weights
from lightning_merge._checks import flag, instance, names, one_of, path, whole
from lightning_merge.callbacks._lightning._recalibrate import prepare, recalibrate
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._strategies import refuse_sharding
from lightning_merge.callbacks._task_run._low_rank import LowRank
from lightning_merge.callbacks._task_run._stored_samples import StoredSamples, calibrated_head, reaching
from lightning_merge.combiners import Combiner, add_vector, task_vector
from lightning_merge.combiners._vectors import refuse_unfit
from lightning_merge.continual import PRESETS, Bank, InitFrom, Preset, StreamState, head_parameters, join_head
from lightning_merge.files import join
from lightning_merge.selections import Selection
from lightning_merge.weights import Weights

Heads = Literal["freeze", "per_task", "grow"]
Made = TypeVar("Made")

_KEY = "lightning_merge_continual"
"""Key of a checkpoint under which a task in progress keeps what it needs to go on."""


class ContinualMerging(Callback):
    """After each ``fit``: takes the task's vector, merges it with those before, leaves the merged model in the module.

    ``vector = trained - base``, the base being the weights at the first ``fit``; ``merged = base + combiner(vectors)``.
    The same callback, or a new one with the same ``bank``, goes into the Trainer of every task:

    - A fit trains from where ``init_from`` says; its validation and the files it writes on the way are of raw weights.
    - After it the module, ``task<i>-merged.ckpt`` beside the other checkpoints, and the files of a ``ModelCheckpoint``
      without a monitor hold the merged model, so any test that follows measures it.
    - The bank holds weights (samples only if told to) and all that the next task needs: a new process goes on from it.
    - Heads are never in a vector. BatchNorm statistics are not either: ``selection.buffers`` says what becomes of them.

    Args:
        preset: ``"average"``, ``"sum"``, ``"ties"``, ``"dare"``, ``"magmax"``, ``"ema"``, ``"opcm"``, ``"wise-ft"``,
            ``"lora-arithmetic"``, or a combiner of your own.
        bank: The stream's folder. One that holds tasks already is continued.
        init_from: Where a task starts: ``"base"``, ``"merged"`` or ``"last"`` (where the last task ended). The preset's
            own by default, ``"base"`` for a combiner.
        scale: How far to go along the merged vector, instead of the preset's.
        heads: ``"grow"``: after a task the head's rows of its classes are as trained and all others as before (if the
            data module names ``classes``; else all are as trained). ``"per_task"``: each task has a head of its own,
            which starts as the base's (``head_of``). ``"freeze"``: it is not trained.
        head: Globs over parameter names; by default the last ``nn.Linear`` of the module.
        selection: Which other parameters are merged, and what becomes of buffers: ``"recompute"`` measures BatchNorm
            statistics under the merged weights on the task's last batches, ``"average"`` takes the mean over tasks,
            ``"copy"`` the last task's. By default all that are trainable, and ``"recompute"``.
        keep_vectors: Also keep every vector in the bank, to remove any task later.
        lora_rank: Rank of the adapters of ``"lora-arithmetic"``; at least 1.
        store_samples_per_class: How many training samples of each class the bank stores, 0 for none; of a class that
            comes again, the latest. After each merge the head is trained for a moment on those of all classes so far,
            as the paper behind ``"lora-arithmetic"`` does with 10. Takes ``heads="grow"`` and batches of inputs and
            class numbers. **This is replay**: leave it at 0 where samples may not be kept.

    Raises:
        ValueError: If an argument is out of range; at fit start if the model is not the bank's, the Trainer has
            nothing left to train, or a class was in an earlier task; at fit end if no step was applied.

    Example:
        >>> ContinualMerging("magmax", bank="bank/").init_from
        'last'
    """

    def __init__(
        self,
        preset: str | Combiner = "magmax",
        bank: str | Path = "bank",
        *,
        init_from: InitFrom | None = None,
        scale: float | None = None,
        heads: Heads = "grow",
        head: str | Sequence[str] | None = None,
        selection: Selection | None = None,
        keep_vectors: bool = False,
        lora_rank: int = 8,
        store_samples_per_class: int = 0,
    ) -> None:
        chosen = _preset(preset)
        self.combiner = chosen.combiner if scale is None else _scaled(chosen.combiner, scale)
        self.init_from: InitFrom = chosen.init_from if init_from is None else one_of("init_from", init_from, InitFrom)
        self.heads: Heads = one_of("heads", heads, Heads)
        self.head = None if head is None else list(names("head", head))
        default = Selection(trainable=True, buffers="recompute")
        self.selection = default if selection is None else instance("selection", selection, Selection)
        self.folder = Path(path("bank", bank))
        self.keep_vectors = flag("keep_vectors", keep_vectors)
        lora_rank = whole("lora_rank", lora_rank, 1)
        self.lora = LowRank(lora_rank) if chosen.lora else None
        store_samples_per_class = whole("store_samples_per_class", store_samples_per_class)
        if store_samples_per_class < 0 or (store_samples_per_class and heads != "grow"):
            raise ValueError(
                "`store_samples_per_class` must be at least 0, and 0 unless `heads` is 'grow', for they train the head"
                f" that all tasks share; got {store_samples_per_class} and {heads!r}."
            )
        self.store_samples_per_class = store_samples_per_class

        self._names: list[str] = []  # of the merged parameters
        self._head_names: list[str] = []
        self._start_head: Weights = {}
        self._trained_before: dict[str, bool] = {}  # which parameters required gradients
        self._base: Weights = {}
        self._task = 0
        self._title = ""
        self._resumed = False
        self._left_off = False  # a fit was interrupted, so the live weights are of a task that was not finished
        self._recent: RecentBatches | None = None
        self._samples: StoredSamples | None = None
        self._active = False

    # ---- what there is

    @property
    def tasks(self) -> list[int | str]:
        """Names of the tasks that are merged now."""
        return self._bank().tasks

    @property
    def completed(self) -> int:
        """Tasks that were taken in, those removed since included: the index of the next one."""
        return self._bank().added

    def merged_vector(self) -> Weights | None:
        """What the merged model adds to the base, by canonical name; ``None`` while there is no task."""
        return self._bank().result()

    def head_of(self, task: int) -> Weights:
        """The head of a task under ``heads="per_task"``, by canonical name: load it to measure or use that task.

        Raises:
            ValueError: If heads are not kept per task, or there is no such task yet.
        """
        done = self.completed
        if self.heads != "per_task" or not 0 <= whole("task", task) < done:
            raise ValueError(f"`task` must be in [0, {done}) and `heads` 'per_task', got {task} and {self.heads!r}.")
        return self._stream().load(done)[f"head{task}"]

    def load_merged(self, module: LightningModule, without: int | str | None = None) -> None:
        """Puts the merged model of the bank into a module of the same architecture: in a new process, say.

        Args:
            module: Its parameters, heads and buffers are written to.
            without: A task to leave out; the bank stays as it is. The bank must have kept every vector.

        Raises:
            ValueError: If the bank is empty, or of another model or base, or has no such task or vector.
        """
        instance("module", module, nn.Module, "a module")
        bank, stream, live = self._bank(), self._stream(), weights.named_tensors(module)
        if not bank.added:
            raise ValueError(f"the bank {self.folder} holds no task yet.")
        state = stream.load(bank.added)
        every = bank.result() or {}
        vector = every if without is None else _result_without(bank, without) or {}
        base = {name: tensor for name, tensor in stream.base().items() if name in every}
        self._bank(base)  # refuses a file of another base
        merged = add_vector(base, vector)
        merged |= {
            name: tensor for part in ("buffers", "other", "head") for name, tensor in state.get(part, {}).items()
        }
        if name := next((n for n, t in merged.items() if n not in live or live[n].shape != t.shape), None):
            raise ValueError(
                f"the bank {self.folder} is of another model: `{name}` of shape {tuple(merged[name].shape)}."
            )
        weights.copy_({name: live[name] for name in merged}, merged)

    def describe(self) -> str:
        """What decides the merged model, in one line: two streams that share it, data and seeds end alike."""
        lora = f", LoRA of rank {self.lora.rank}" if self.lora else ""
        stored = f", {self.store_samples_per_class} samples of a class stored" if self.store_samples_per_class else ""
        return f"{self.combiner}, from {self.init_from}, heads {self.heads}, {self.selection}{lora}{stored}"

    # ---- a fit begins

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Puts the weights that the task starts from in place, before the optimizer or a checkpoint sees them."""
        if stage != "fit":
            return
        refuse_sharding(trainer.strategy, "ContinualMerging")
        _refuse_order(trainer, self)
        self._head_names = head_parameters(pl_module, self.head, "head")
        if self.store_samples_per_class:
            _head_layer(pl_module, self._head_names)  # there is one
        merged = [name for name in self.selection.parameters(pl_module) if name not in self._head_names]
        self._names = list(LowRank.targets(pl_module, merged)) if self.lora else merged
        if not self._names:
            raise ValueError(f"there is nothing to merge: {self.selection} leaves only the head, {self._head_names}.")
        live_parameters = weights.named_parameters(pl_module)
        refuse_unfit({name: live_parameters[name] for name in self._names}, "of the model")  # now, not after the task
        self._trained_before = {name: p.requires_grad for name, p in weights.named_parameters(pl_module).items()}
        start = _on_one_process(trainer, lambda: self._open(pl_module, trainer))
        self._task, self._base = start["done"], start["base"]
        self._title = str(getattr(_data(trainer), "task", f"task{self._task}"))
        live = weights.named_tensors(pl_module)
        for name, tensor in start["tensors"].items():
            with torch.no_grad():  # of a head that has grown, the rows there were
                live[name][: len(tensor)].copy_(tensor) if tensor.dim() else live[name].copy_(tensor)
        self._start_head = weights.copies({name: live[name] for name in self._head_names})
        if self.lora is not None:
            self.lora.attach(pl_module, self._names)
        for name, parameter in weights.named_parameters(pl_module).items():
            if name in self._head_names:
                parameter.requires_grad_(self.heads != "freeze")
        self._active, self._resumed = True, False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a Trainer with nothing left to train, and gets ready to keep batches."""
        done, most = trainer.fit_loop.epoch_progress.current.completed, trainer.fit_loop.max_epochs
        if not self._resumed and most is not None and 0 <= most <= done:
            raise ValueError(
                f"`max_epochs` of this Trainer must be more than the {done} epochs it has trained already, got {most}:"
                f" {self._title} would have an empty task vector. Use a new Trainer for each task."
            )
        if self.selection.buffers == "recompute" and calibration.batch_norm_layers(pl_module):
            self._recent = self._recent if self._resumed and self._recent else RecentBatches()
            prepare(trainer, pl_module, "ContinualMerging", self._recent)
        if self.store_samples_per_class and not (self._resumed and self._samples):
            self._samples = StoredSamples(self.store_samples_per_class)
        rank_zero_info(
            f"ContinualMerging: {self._title} is task {self._task} of the bank {self.folder}, starts from"
            f" {'the base' if not self._task else self.init_from}; {len(self._names)} tensors are merged by"
            f" {self.combiner}, {len(self._head_names)} are the head's ({self.heads})."
        )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copies what is kept of the batch, before the step can change it."""
        if self._recent is not None:
            self._recent.hold(batch)
        if self._samples is not None and trainer.is_global_zero:
            is_first = not self._samples.by_class
            self._samples.take(batch)
            if is_first:  # a head that cannot be trained alone is better refused now than when the task is trained
                layer, samples = _head_layer(pl_module, self._head_names), next(iter(self._samples.by_class.values()))
                reaching(trainer, pl_module, layer, samples)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps it."""
        if self._recent is not None:
            self._recent.keep()

    # ---- a fit ends

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the task in."""
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes in a task that was fully trained in the file it was resumed from: Lightning trains nothing then."""
        if not self._active:
            return
        if not self._resumed:
            raise ValueError(
                f"{self._title} trained nothing, so it would have an empty task vector: the Trainer had no batches, no"
                " epochs or no steps left."
            )
        pl_module.to(trainer.strategy.root_device)
        self._finish(trainer, pl_module)
        pl_module.cpu()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the raw weights; the bank is as it was before the task."""
        if self._active:
            self._left_off = True
            self._leave(pl_module)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        products = self.lora.detach(module) if self.lora else {}
        live = weights.named_tensors(module)
        raw = weights.copies({name: live[name] for name in (*self._names, *self._buffer_names(module))})
        # The base as it was trained from: in half precision, its rounding is no part of what the task learned.
        base = {name: self._base[name].to(live[name]) for name in self._names}
        vector = products or task_vector({name: raw[name] for name in self._names}, base)
        vector = {name: tensor.contiguous() for name, tensor in vector.items()}  # channels-last is no matter of merging
        if products:
            raw |= {name: raw[name] + products[name].to(raw[name]) for name in self._names}

        title, task = self._title, self._task
        before: dict[str, Weights] = {}
        bank = self._bank(self._base)

        def merge() -> Weights:
            before.update(self._stream().load(task) if task else {})
            start = self._start(bank, before)
            if all(torch.equal(raw[name], start[name].to(raw[name])) for name in self._names):
                raise ValueError(
                    f"{title} would have an empty task vector: training moved none of the {len(vector)} tensors that"
                    " are merged. Is the learning rate 0, or was every step skipped?"
                )
            merged = bank.preview(vector, task=title)
            return add_vector(self._base, merged) | self._buffers(raw, before.get("buffers", {}), module)

        published = _on_one_process(trainer, merge)
        weights.copy_({name: live[name] for name in published}, published)
        head = self._join_head(trainer, module)
        weights.copy_({name: live[name] for name in head}, head)
        if self._recent is not None and self._recent.batches:
            fresh = recalibrate(trainer, module, "ContinualMerging", self._recent)
            weights.copy_({name: live[name] for name in fresh}, fresh)
        others = self._other_names(module)
        samples: dict[int, Tensor] = {}
        if self._samples is not None:
            stored = {int(label): kept for label, kept in before.get("samples", {}).items()}
            samples = stored | self._samples.by_class
            head = _on_one_process(trainer, lambda: self._calibrated(trainer, module, head, samples))
            weights.copy_({name: live[name] for name in head}, head)

        def keep() -> None:
            # What earlier tasks left that this one does not replace: their heads, and which classes they had.
            parts = {part: tensors for part, tensors in before.items() if part.startswith(("head", "classes"))}
            parts |= {
                "head": head,
                "buffers": {name: live[name] for name in self._buffer_names(module)},
                "other": {name: live[name] for name in others},
                "samples": {str(label): kept for label, kept in samples.items()},
            }
            if self.heads == "per_task":
                parts[f"head{task}"] = head
            if self.init_from == "last":
                parts["last"] = raw
            if (classes := _classes(trainer)) is not None:
                parts["classes"] = parts.get("classes", {}) | {title: torch.tensor(classes)}
            stream = self._stream()
            stream.save(task + 1, parts)
            bank.add(vector, task=title)  # from here on the task is part of the stream
            stream.forget_before(task + 1)

        _on_one_process(trainer, keep)
        self._leave(module)
        self._left_off = False
        self._write_files(trainer, module)
        rank_zero_info(f"The model now holds the merged weights of {task + 1} tasks ({self.combiner}).")

    def _calibrated(
        self, trainer: Trainer, module: LightningModule, head: Weights, samples: dict[int, Tensor]
    ) -> Weights:
        """The head after a short training on stored samples."""
        found = calibrated_head(trainer, module, _head_layer(module, self._head_names), samples)
        return {name: found[name.rpartition(".")[2]].to(tensor) for name, tensor in head.items()}

    def _leave(self, module: LightningModule) -> None:
        """The module as it was given: no adapters, and what required gradients does."""
        self._active = False
        self._recent = self._samples = None
        if self.lora is not None and self.lora.is_attached:
            live = weights.named_tensors(module)
            for name, product in self.lora.detach(module).items():
                live = weights.named_tensors(module)
                live[name].data += product.to(live[name])
        for name, parameter in weights.named_parameters(module).items():
            parameter.requires_grad_(self._trained_before.get(name, True))

    def _write_files(self, trainer: Any, module: LightningModule) -> None:
        """The merged model beside the other checkpoints, and in the place of the last raw weights."""
        paths = []
        directory = getattr(trainer.checkpoint_callback, "dirpath", None)
        if directory is not None and not trainer.fast_dev_run:
            paths.append((join(directory, f"{self._title}-merged.ckpt"), True))
        for callback in trainer.checkpoint_callbacks:
            if getattr(callback, "monitor", "") is None:
                for path in {callback.best_model_path, callback.last_model_path} - {""}:
                    if not Path(path).is_symlink():
                        paths.append((path, callback.save_weights_only))
        for path, weights_only in paths:
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only)
            checkpoint.pop("lightning_merge", None)  # what an average of this fit says of its own weights
            checkpoint["state_dict"] = module.state_dict()
            checkpoint[_KEY] = {"format": 1, "holds": "merged", "task": self._task, "title": self._title}
            trainer.strategy.save_checkpoint(checkpoint, path)
        trainer.strategy.barrier("lightning_merge_continual")

    # ---- checkpoints of a task in progress

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds which task it is, and the batches kept, so that a resumed task ends bit for bit alike."""
        if self._active:
            recent = [] if self._recent is None else self._recent.saved()
            checkpoint[_KEY] = {"format": 1, "holds": "raw", "task": self._task, "title": self._title, "recent": recent}
            if self._samples is not None:
                checkpoint[_KEY]["samples"] = dict(self._samples.by_class)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on with a task in progress, and with no other."""
        if not self._active:
            return
        section = checkpoint.get(_KEY, {"holds": "raw", "task": self._task, "title": self._title, "recent": []})
        if section["holds"] == "merged" or section["task"] != self._task:
            raise ValueError(
                f"this checkpoint is of {section['title']}, task {section['task']} of a stream, and the bank"
                f" {self.folder} goes on with task {self._task}. Resume from a file of that task, or fit the next one"
                " without `ckpt_path`."
            )
        self._resumed = True
        if section["recent"]:
            self._recent = RecentBatches.restored(section["recent"])
        if self.store_samples_per_class:
            self._samples = StoredSamples(self.store_samples_per_class, section.get("samples"))

    # ---- what is where

    def _bank(self, base: Weights | None = None) -> Bank:
        return Bank(self.folder, self.combiner, base=base, keep_vectors=self.keep_vectors)

    def _stream(self) -> StreamState:
        return StreamState(self.folder)

    def _open(self, module: LightningModule, trainer: Trainer) -> dict[str, Any]:
        """Where the stream is, its base, and the tensors that the next task starts from."""
        instance("module", module, nn.Module, "a module")
        bank, stream, live = self._bank(), self._stream(), weights.named_tensors(module)
        done = bank.added
        # A base of a first task that was never taken in is of use only to go on with that task.
        goes_on = self._left_off or trainer.ckpt_path is not None
        if not done and not (stream.has_base and goes_on):
            stream.save_base(live)
        base = stream.base()
        _refuse_other_model({name: live[name] for name in self._names}, base, self._head_names)
        self._base = {name: base[name] for name in self._names}
        bank = self._bank(self._base)  # refuses a file of another base before anything is trained
        if not self._left_off:
            self._refuse_other_base(live, self._base, add_vector(self._base, bank.result() or {}))
        state = stream.load(done) if done else {}
        self._refuse_known_classes(trainer, state.get("classes", {}))
        tensors = {name: base[name] for name in self._buffer_names(module) if name in base}
        tensors |= self._start(bank, state) | state.get("other", {})
        heads = state.get("head", {}) if self.heads == "grow" else {n: base[n] for n in self._head_names if n in base}
        fits = {n: t for n, t in heads.items() if t.shape[1:] == live[n].shape[1:] and len(t) <= len(live[n])}
        return {"done": done, "base": self._base, "tensors": tensors | fits}

    def _start(self, bank: Bank, state: dict[str, Weights]) -> Weights:
        """The merged parameters that a task starts from, and the buffers where they are not the base's."""
        if not bank.added or self.init_from == "base":
            return self._base
        if self.init_from == "last":
            return state["last"]
        return add_vector(self._base, bank.result() or {}) | state.get("buffers", {})

    def _refuse_other_base(self, live: Weights, base: Weights, merged: Weights) -> None:
        other = next((name for name in base if not torch.equal(live[name], base[name].to(live[name]))), None)
        if other is None or all(torch.equal(live[name], merged[name].to(live[name])) for name in merged):
            return
        raise ValueError(
            f"the bank {self.folder} is of another base: `{other}` of the model is neither the base's (hash"
            f" {_hash(base)}, the model has {_hash(live, base)}) nor that of the merged model. Build the model as for"
            " the first task, with the same seed or pretrained weights, or name a new folder with `bank`."
        )

    def _refuse_known_classes(self, trainer: Trainer, known: Weights) -> None:
        classes = set(_classes(trainer) or ()) if self.heads == "grow" else set()
        for task, earlier in known.items():
            if both := sorted(classes & set(earlier.tolist())):
                raise ValueError(
                    f"class {both[0]} was in {task} already, whose rows of the head would be written over. In a"
                    " class-incremental stream no class is in two tasks; for a domain-incremental one give data without"
                    " `classes`."
                )

    def _buffer_names(self, module: LightningModule) -> list[str]:
        return list(weights.named_buffers(module))

    def _other_names(self, module: LightningModule) -> list[str]:
        """Parameters that train but are neither merged nor the head's: they stay as they are live."""
        known = {*self._names, *self._head_names}
        return [n for n in weights.named_parameters(module) if n not in known and self._trained_before.get(n, True)]

    def _buffers(self, raw: Weights, before: Weights, module: LightningModule) -> Weights:
        own = {name: raw[name] for name in self._buffer_names(module)}
        if self.selection.buffers == "average":
            for name, mean in before.items():
                if weights.is_averaged(mean):
                    own[name] = torch.lerp(mean.to(own[name]), own[name], 1 / (self._task + 1))
        return own

    def _join_head(self, trainer: Trainer, module: LightningModule) -> Weights:
        live = weights.named_tensors(module)
        head = weights.copies({name: live[name] for name in self._head_names})
        if self.heads == "grow":
            by_class = {name: head[name] for name in head_parameters(module, None) if name in head}
            head |= join_head(by_class, self._start_head, _classes(trainer))
        return head


def _head_layer(module: LightningModule, names: Sequence[str]) -> nn.Linear:
    """The layer whose parameters the head is."""
    for place, layer in weights.submodules(module):
        own = [weights.canonical(f"{place}.{name}".lstrip(".")) for name, _ in layer.named_parameters(recurse=False)]
        if isinstance(layer, nn.Linear) and own == list(names):
            return layer
    raise ValueError(
        f"`store_samples_per_class` must be 0 here: the head must be one linear layer, and it is {list(names)}."
    )


def _preset(preset: str | Combiner) -> Preset:
    if isinstance(preset, Combiner):
        return Preset(preset, "base")
    return PRESETS[one_of("preset", preset, tuple(PRESETS), f"a combiner or one of {', '.join(map(repr, PRESETS))}")]


def _scaled(combiner: Combiner, scale: float) -> Combiner:
    if not hasattr(combiner, "scale"):
        raise ValueError(f"`scale` must be left out for {combiner!r}, which has none, got {scale}.")
    scaled: Combiner = replace(combiner, scale=scale)  # type: ignore[type-var]
    return scaled


def _data(trainer: Trainer) -> Any:
    return getattr(trainer, "datamodule", None)


def _classes(trainer: Trainer) -> Sequence[int] | None:
    classes: Sequence[int] | None = getattr(_data(trainer), "classes", None)
    return classes


def _result_without(bank: Bank, task: int | str) -> Weights | None:
    bank.vector(task)  # there is one
    others = [other for other in bank.tasks if other != task]
    return bank.combiner.combine((bank.vector(other) for other in others), tasks=others) if others else None


def _on_one_process(trainer: Trainer, work: Callable[[], Made]) -> Made:
    """What the first process makes or raises, in all of them: files are read and written once."""
    made: tuple[Any, Exception | None] = None, None
    if trainer.is_global_zero:
        try:
            made = work(), None
        except Exception as error:
            made = None, error
    result, failure = trainer.strategy.broadcast(made)
    if failure is not None:
        raise failure
    return result  # type: ignore[no-any-return]


def _refuse_order(trainer: Trainer, callback: ContinualMerging) -> None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if sum(isinstance(other, ContinualMerging) for other in callbacks) > 1:
        raise ValueError("a Trainer must have one ContinualMerging, got two: each would take the task in.")
    for other in callbacks[callbacks.index(callback) + 1 :]:
        if hasattr(other, "merged_weights"):
            raise ValueError(
                f"{type(other).__name__} must come before ContinualMerging in `callbacks`: the vector of a task is that"
                " of the weights it publishes at the end."
            )


def _refuse_other_model(live: Weights, base: Weights, head: Sequence[str]) -> None:
    for name, tensor in live.items():
        if name in base and base[name].shape == tensor.shape:
            continue
        found = f"shape {tuple(tensor.shape)}"
        if name not in base:
            raise ValueError(f"the model is not that of the bank's first task: `{name}` of {found} was not in it.")
        if base[name].shape[1:] == tensor.shape[1:]:
            raise ValueError(
                f"`{name}` has {found} instead of {tuple(base[name].shape)}: if it is a head that grew, it must not be"
                f" merged. Name it with `head='{name.rpartition('.')[0]}.*'` (the head is {list(head) or 'none'})."
            )
        raise ValueError(
            f"the backbone changed between tasks: `{name}` has {found} instead of {tuple(base[name].shape)}. Vectors of"
            " different models cannot be merged; name a new folder with `bank`."
        )


def _hash(tensors: Weights, names: Weights | None = None) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors if names is None else names):
        digest.update(name.encode())
        digest.update(tensors[name].detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
