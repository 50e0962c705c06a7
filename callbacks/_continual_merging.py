"""Continual learning by merging: a task vector per fit, and the merged model of all tasks so far after each."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge._checks import flag, instance, names, one_of, path, whole
from lightning_merge.callbacks._lightning._internals import checkpoint_connector
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._lightning._recalibrate import recalibrate
from lightning_merge.callbacks._lightning._strategies import refuse_sharding
from lightning_merge.callbacks._task_run._beside import note_finished, refuse_order
from lightning_merge.callbacks._task_run._ending import Ending
from lightning_merge.callbacks._task_run._files import KEY, TaskSaved, write_merged
from lightning_merge.callbacks._task_run._fit import Fit
from lightning_merge.callbacks._task_run._heads import Heads
from lightning_merge.callbacks._task_run._low_rank import LowRank
from lightning_merge.callbacks._task_run._presets import chosen_preset
from lightning_merge.callbacks._task_run._settings import Settings
from lightning_merge.callbacks._task_run._start import FINISHED
from lightning_merge.callbacks._task_run._store import Store
from lightning_merge.combiners import Combiner, add_vector
from lightning_merge.continual import Bank, InitFrom, StreamState
from lightning_merge.selections import Selection
from lightning_merge.weights import Weights


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
            ``"fisher"``, ``"regmean"``, ``"emr"``, ``"iso-c"``, ``"lora-arithmetic"``, or a combiner of your own. Of
            one that weighs by statistics those of each task are measured at its end, on the last batches.
        bank: The stream's folder. One that holds tasks already is continued.
        init_from: Where a task starts: ``"base"``, ``"merged"`` or ``"last"`` (where the last task ended). The preset's
            own by default, ``"base"`` for a combiner.
        scale: How far to go along the merged vector, instead of the preset's.
        heads: ``"grow"``: after a task the head's rows of its classes are as trained and all others as before (if the
            data module names ``classes``; else all are as trained). ``"per_task"``: each task has a head of its own,
            which starts as the base's (``head_of``). ``"freeze"``: it is not trained.
        head: Globs over parameter names, ``[]`` for none. By default it is looked for, in the loss of the first batch:
            the layer that makes the logits, with its bias, its temperature and its like in a list of heads. Where heads
            are frozen or adapters are trained it has to be known before: the last ``nn.Linear``, which is then held
            against that loss.
        selection: Which other parameters are merged, and what becomes of buffers: ``"recompute"`` measures BatchNorm
            statistics under the merged weights on the task's last batches, ``"average"`` takes the mean over tasks,
            ``"copy"`` the last task's. By default all that are trainable, and ``"recompute"``.
        keep_vectors: Also keep every vector in the bank, to remove any task later.
        lora_rank: Rank of the adapters of ``"lora-arithmetic"``; at least 1.
        store_samples_per_class: How many training samples of each class the bank stores, 0 for none; of a class that
            comes again, the latest. After each merge the head is trained for a moment on those of all classes so far,
            as the paper behind ``"lora-arithmetic"`` does with 10. Takes ``heads="grow"`` and batches of inputs and
            class numbers. **This is replay**: leave it at 0 where samples may not be kept.

    Attributes:
        tasks: Names of the tasks that are merged now.
        completed: Tasks that were taken in, those removed since included: the index of the next one.

    Raises:
        ValueError: If an argument is out of range. Before a step is trained: if the model is not the bank's, the
            Trainer has nothing left to train, a class was in an earlier task or has no row in the head, the task's name
            is in the bank, one cannot tell the head, or another callback has an earlier task's weights or files. At fit
            end if no step was applied, a weight is not finite, or something was trained that no vector has a place for.
            Whatever fails there: the raw weights are in the module, and a note of the error names the file that the
            task is in, which ``Bank.rebuild`` takes in.

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
        chosen = chosen_preset(preset)
        self.combiner = chosen.combiner if scale is None else chosen.combiner.with_scale(scale)
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

        self._fit: Fit | None = None  # from the start of a task until it is part of the stream
        self._patches = Patches()  # from `setup` until the module is built
        self._left_off = False  # a fit was interrupted, so the live weights are of a task that was not finished

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

        Args:
            task: Index of the task in the order of training, from 0.

        Raises:
            ValueError: If heads are not kept per task, or there is no such task yet.
        """
        done = self.completed
        if self.heads != "per_task" or not 0 <= whole("task", task) < done:
            raise ValueError(f"`task` must be in [0, {done}) and `heads` 'per_task', got {task} and {self.heads!r}.")
        return self._stream.load(done)[f"head{task}"]

    def weights_of(self, task: int) -> Weights:
        """The weights that serve a task under ``"emr"``, by canonical name: its own, as near as signs bring them.

        With its head under ``heads="per_task"``. Load them to use that task; the merged model is one for all.

        Args:
            task: Index of the task in the order of training, from 0.

        Raises:
            ValueError: If the combiner is another, or there is no such task, or it was removed.
        """
        bank = self._bank()
        if not 0 <= whole("task", task) < bank.added:
            raise ValueError(f"`task` must be in [0, {bank.added}), got {task}.")
        vector = bank.vector_for(bank.all_tasks[task])
        base = self._stream.base()
        own = add_vector({name: base[name] for name in vector}, vector)
        return own | (self.head_of(task) if self.heads == "per_task" else {})

    def load_merged(self, module: LightningModule, without: int | str | None = None) -> None:
        """Puts the merged model of the bank into a module of the same architecture: in a new process, say.

        Args:
            module: Its parameters, heads and buffers are written to.
            without: A task to leave out; the bank stays as it is. The bank must have kept every vector.

        Raises:
            ValueError: If the bank is empty, or of another model or base, or has no such task or vector.
        """
        live = weights.named_tensors(instance("module", module, nn.Module, "a module"))
        merged = self._store.merged_model(live, without)
        weights.copy_({name: live[name] for name in merged}, merged)

    def describe(self) -> str:
        """What decides the merged model, in one line: two streams that share it, data and seeds end alike."""
        lora = f", LoRA of rank {self.lora.rank}" if self.lora else ""
        stored = f", {self.store_samples_per_class} samples of a class stored" if self.store_samples_per_class else ""
        return f"{self.combiner}, from {self.init_from}, heads {self.heads}, {self.selection}{lora}{stored}"

    @property
    def _store(self) -> Store:
        return Store(self.folder, self.combiner, self.keep_vectors, self.init_from)

    def _bank(self) -> Bank:
        return self._store.bank()

    @property
    def _stream(self) -> StreamState:
        return self._store.stream

    # ---- a fit begins

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Has the weights that the task starts from put in place once the module is built.

        That is after its own ``setup`` and ``configure_model``, before an optimizer or a checkpoint sees it.
        """
        if stage != "fit":
            return
        refuse_sharding(trainer.strategy, "ContinualMerging")
        refuse_order(trainer.callbacks, self)  # type: ignore[attr-defined]
        self._fit = None
        self._patches.undo()

        def open_first(original: Any, *args: Any, **kwargs: Any) -> Any:
            self._patches.undo()
            self._open(trainer, pl_module)
            return original(*args, **kwargs)

        self._patches.replace(checkpoint_connector(trainer), "resume_start", open_first)

    def _open(self, trainer: Trainer, module: LightningModule) -> None:
        settings = Settings(self._store, self.head, self.heads, self.selection, self.lora, self.store_samples_per_class)
        self._fit = Fit(trainer, module, settings, self._left_off)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuses a Trainer with nothing left to train, and gets ready to keep batches."""
        self._running.get_ready(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Looks for the head with the first batch, and copies what is kept of each before the step can change it."""
        self._running.begin_batch(trainer, pl_module, batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the first loss where the step could not be tried."""
        if self._fit is not None:
            self._fit.see_loss(pl_module, loss)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps it."""
        self._running.end_batch(trainer, pl_module)

    @property
    def _running(self) -> Fit:
        if self._fit is None:
            raise RuntimeError("ContinualMerging works within `Trainer.fit` only, and no task has been started.")
        return self._fit

    # ---- a fit ends

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the task in."""
        self._finish(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes in a task that was fully trained in the file it was resumed from: Lightning trains nothing then."""
        if self._fit is None:
            return
        if not self._fit.resumed:
            raise ValueError(
                f"{self._fit.title} trained nothing, so it would have an empty task vector: the Trainer had no batches,"
                " no epochs or no steps left."
            )
        pl_module.to(trainer.strategy.root_device)
        self._finish(trainer, pl_module)
        pl_module.cpu()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leaves the raw weights; the bank is as it was before the task."""
        self._patches.undo()
        if self._fit is not None:
            fit, self._fit = self._fit, None
            self._left_off = True
            fit.leave(pl_module)

    def _finish(self, trainer: Trainer, module: LightningModule) -> None:
        fit = self._running
        ending = Ending(trainer, module, fit)
        with ending.nothing_lost():
            ending.merge()
            if fit.recalibrates and fit.recent is not None and fit.recent.batches:
                ending.put(recalibrate(trainer, module, "ContinualMerging", fit.recent))
            ending.calibrate_head()
            ending.keep()
        fit.leave(module)
        self._fit, self._left_off = None, False
        FINISHED[module] = str(self.folder.resolve())
        note_finished(trainer.callbacks)  # type: ignore[attr-defined]
        write_merged(trainer, module, fit.task, fit.title)
        rank_zero_info(f"The model now holds the merged weights of {fit.task + 1} tasks ({self.combiner}).")

    # ---- checkpoints of a task in progress

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds which task it is, and the batches kept, so that a resumed task ends bit for bit alike."""
        if self._fit is not None:
            checkpoint[KEY] = self._fit.saved().section()

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Goes on with a task in progress, and with no other."""
        if self._fit is not None:
            fit = self._fit
            saved = TaskSaved.of(checkpoint[KEY]) if KEY in checkpoint else TaskSaved("raw", fit.task, fit.title)
            fit.resume(saved, pl_module)
