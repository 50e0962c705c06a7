"""The end of a task: its vector into the bank, the merged model into the module, and nothing trained lost."""

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_merge import weights
from lightning_merge.callbacks._lightning._on_one_process import on_one_process
from lightning_merge.callbacks._task_run._fit import Fit
from lightning_merge.callbacks._task_run._statistics import measured, measures
from lightning_merge.combiners import add_vector, task_vector
from lightning_merge.continual._rescue import Rescue
from lightning_merge.importance import Statistics
from lightning_merge.weights import Weights


@final
class Ending:
    """A task that is trained and not yet part of its stream.

    Adapters are taken off and added to the weights; else the module is as training left it until ``merge``.

    Args:
        trainer: The Trainer of the fit.
        module: The module.
        fit: The task.

    Raises:
        ValueError: If a tensor is not the one that the task began with, or holds a NaN.
    """

    def __init__(self, trainer: Any, module: LightningModule, fit: Fit) -> None:
        self.trainer, self.module, self.fit = trainer, module, fit
        self.store = fit.settings.store
        products = fit.settings.lora.detach(module) if fit.settings.lora else {}
        live = weights.named_tensors(module)
        for name, product in products.items():
            live[name].data += product.to(live[name])
        self.head_of = fit.settle(module)
        self._raw_head = weights.copies({name: live[name] for name in self.head_of.names})
        self._refuse_other(live)
        self.names = list(fit.names)
        self.base = {name: fit.base[name] for name in self.names}
        self.moved: list[str] = []
        self.raw = weights.copies({name: live[name] for name in (*self.names, *weights.named_buffers(module))})
        self.vector = products or self._vector(self.names)
        self._before: dict[str, Weights] = {}
        self._head: Weights = self._raw_head
        self._samples: dict[int, Tensor] = {}
        self._statistics: Statistics | None = None
        self._is_empty = False

    @contextmanager
    def nothing_lost(self) -> Iterator[None]:
        """If the block fails, the module has the raw weights again, and the task is in a file."""
        try:
            yield
        except BaseException as error:
            live = weights.named_tensors(self.module)
            for name, tensor in {**self.raw, **self._raw_head}.items():
                with torch.no_grad():
                    live[name].copy_(tensor)
            if self.trainer.is_global_zero and not self._is_empty:
                error.add_note(self._rescue())
            raise

    def merge(self) -> None:
        """Puts the merged model into the module; its head's rows of other classes are as before.

        Raises:
            ValueError: If training moved nothing, or what is not in the vector.
        """
        self._take_in_moved()
        bank, fit = self.store.bank(self.base), self.fit
        self._measure()

        def merged() -> Weights:
            self._before = self.store.stream.load(fit.task) if fit.task else {}
            self._refuse_empty(self.store.start(bank, self.base, self._before))
            if self.moved:
                raise fit.settings.trained_later(self.moved[0])
            vector = bank.preview(self.vector, task=fit.title, statistics=self._statistics)
            return add_vector(self.base, vector) | self._buffers(self._before.get("buffers", {}))

        published = on_one_process(self.trainer, merged)
        live = weights.named_tensors(self.module)
        weights.copy_({name: live[name] for name in published}, published)
        self._head = self.head_of.joined(self.module, self._start_head(), fit.classes)
        self.put(self._head)

    def _measure(self) -> None:
        """What the combiner weighs the task by, of the raw weights, which are live."""
        combiner, on = self.store.combiner, self.fit.measured_on
        if on is not None and (kind := measures(combiner, self.fit.title)) is not None:
            self._statistics = measured(self.trainer, self.module, combiner, kind, self.names, on)

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Writes some of the module's tensors."""
        live = weights.named_tensors(self.module)
        weights.copy_({name: live[name] for name in tensors}, dict(tensors))

    def calibrate_head(self) -> None:
        """Trains the head for a moment on the stored samples, if any are stored."""
        if self.fit.samples is not None:
            stored = {int(label): kept for label, kept in self._before.get("samples", {}).items()}
            self._samples = samples = stored | self.fit.samples.by_class
            if samples:
                found = lambda: self.head_of.calibrated(self.trainer, self.module, self._head, samples)  # noqa: E731
                self._head = on_one_process(self.trainer, found)
                self.put(self._head)

    def keep(self) -> None:
        """Takes the task into the bank."""
        parts = self._parts()

        def write() -> None:
            stream, done = self.store.stream, self.fit.task + 1
            bank = self.store.bank(self.base)
            with bank.alone():
                if bank.added != self.fit.task:
                    raise ValueError(
                        f"the bank {self.store.folder} got other tasks while {self.fit.title} was trained: it holds"
                        f" {bank.tasks}. Nothing was written to it; one run at a time goes on with a stream."
                    )
                stream.save(done, parts)
                # From here on the task is part of the stream.
                bank.add(self.vector, task=self.fit.title, statistics=self._statistics)
            with suppress(OSError):  # the next task drops them
                stream.forget_before(done)

        on_one_process(self.trainer, write)

    # ---- what training has left

    def _vector(self, names: Sequence[str]) -> Weights:
        # The base as it was trained from: in half precision, its rounding is no part of what the task learned.
        base = {name: self.base[name].to(self.raw[name]) for name in names}
        vector = task_vector({name: self.raw[name] for name in names}, base)
        return {name: tensor.contiguous() for name, tensor in vector.items()}  # channels-last is no matter of merging

    def _refuse_other(self, live: Mapping[str, Tensor]) -> None:
        for name in self.fit.names:
            tensor = self.fit.base[name]
            if name not in live or live[name].shape != tensor.shape:
                found = "is gone" if name not in live else f"has shape {tuple(live[name].shape)}"
                raise ValueError(
                    f"`{name}` {found} at the end of {self.fit.title}, and had shape {tuple(tensor.shape)} when it"
                    " began: something replaced it during the fit. Leave it out"
                    " (`selection=Selection(exclude=...)`), or change the model before the first task of a new `bank`."
                )

    def _take_in_moved(self) -> None:
        """What was frozen when a first task began and has moved becomes part of the vectors."""
        live = weights.named_tensors(self.module)
        self.moved, base = on_one_process(self.trainer, lambda: self._moved(live))
        if base:
            self.names += base
            self.base |= base
            self.raw |= weights.copies({name: live[name] for name in base})
            self.vector |= self._vector(list(base))

    def _moved(self, live: Mapping[str, Tensor]) -> tuple[list[str], Weights]:
        """What is named by the selection, was frozen when the task began, and has moved; of a first task its base."""
        fit = self.fit
        named = fit.settings.named(self.module) - {*fit.names, *self.head_of.names}
        if fit.settings.lora is not None or not named:
            return [], {}
        base = self.store.stream.base()
        start = {**base, **(self.store.stream.load(fit.task).get("other", {}) if fit.task else {})}
        order = [name for name in live if name in named]
        if late := [name for name in order if name not in start]:
            rank_zero_warn(
                f"`{late[0]}` was made during the fit, so it has no base: it stays as it was trained and is not merged."
                " Make layers in `__init__`, `setup` or `configure_model`."
            )
        moved = [n for n in order if n in start and not torch.equal(live[n], start[n].to(live[n]))]
        moved = [name for name in moved if fit.task == 0 or not fit.trained_before.get(name, False)]
        return (moved, {}) if fit.task else ([], {name: base[name] for name in moved})

    def _refuse_empty(self, start: Weights) -> None:
        if all(torch.equal(self.raw[name], start[name].to(self.raw[name])) for name in self.names):
            self._is_empty = True
            raise ValueError(
                f"{self.fit.title} would have an empty task vector: training moved none of the"
                f" {len(self.vector)} tensors that are merged. Is the learning rate 0, or was every step skipped?"
            )

    # ---- what no vector holds

    def _start_head(self) -> Weights:
        known = self.fit.start_head
        if missing := [name for name in self.head_of.by_class if name not in known]:
            base = on_one_process(self.trainer, lambda: {n: self.store.stream.base().get(n) for n in missing})
            known = {**known, **{name: tensor for name, tensor in base.items() if tensor is not None}}
        return {name: known[name] for name in self.head_of.by_class if name in known}

    def _buffers(self, before: Weights) -> Weights:
        own = {name: self.raw[name] for name in weights.named_buffers(self.module)}
        if self.fit.settings.selection.buffers == "average":
            for name, mean in before.items():
                if name in own and weights.is_averaged(mean):
                    own[name] = torch.lerp(mean.to(own[name]), own[name], 1 / (self.fit.task + 1))
        return own

    def _parts(self) -> dict[str, Weights]:
        """What no vector holds, as it is after the task."""
        fit, live = self.fit, weights.named_tensors(self.module)
        known = {*self.names, *self.head_of.names}
        # Parameters that train but are neither merged nor the head's stay as they are live.
        others = [
            name
            for name, parameter in weights.named_parameters(self.module).items()
            if name not in known
            and (fit.trained_before.get(name, True) or parameter.requires_grad or name in self.moved)
        ]
        # What earlier tasks left that this one does not replace: their heads, and which classes they had.
        parts = {part: kept for part, kept in self._before.items() if part.startswith(("head", "classes"))}
        parts |= {
            "head": self._head,
            "buffers": {name: live[name] for name in weights.named_buffers(self.module)},
            "other": {name: live[name] for name in others},
            "samples": {str(label): kept for label, kept in self._samples.items()},
        }
        if self.head_of.mode == "per_task":
            parts[f"head{fit.task}"] = self._head
        if self.store.init_from == "last":
            parts["last"] = self.raw
        if fit.classes is not None:
            parts["classes"] = parts.get("classes", {}) | {fit.title: torch.tensor(fit.classes)}
        return parts

    def _rescue(self) -> str:
        """Writes the task to a file, wherever that is possible, and says where."""
        rescued = Rescue(self.fit.task, self.fit.title, self.vector, self._parts(), self._statistics)
        for folder in (self.store.folder, Path(self.trainer.default_root_dir), Path(tempfile.gettempdir())):
            with suppress(OSError):
                path = rescued.write(folder)
                vectors = ", keep_vectors=True" if self.store.keep_vectors else ""
                return (
                    f"{self.fit.title} is trained: the raw weights are in the module, and the task is in {path}. Once"
                    f" the cause is gone, take it in: `Bank({str(self.store.folder)!r},"
                    f" {self.store.combiner!r}{vectors}).rebuild({str(path)!r})`."
                )
        return f"{self.fit.title} is trained: the raw weights are in the module; no file could be written."
