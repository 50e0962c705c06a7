"""Statistics for merging, measured at the end of a fit."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_merge._checks import one_of, whole, word
from lightning_merge._ranks import gathered
from lightning_merge.callbacks._importance_run._fisher import FisherPass
from lightning_merge.callbacks._importance_run._grams import GramPass
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._strategies import refuse_sharding
from lightning_merge.callbacks._publication._callback import Published
from lightning_merge.files import is_remote, join
from lightning_merge.importance import Statistics
from lightning_merge.importance._moments import keeps_moments, second_moments
from lightning_merge.importance._statistics import Kind, Labels
from lightning_merge.selections import Selection
from lightning_merge.weights import Weights

_MOST = 256 * 2**20
"""Bytes of batches that are kept."""


class ImportanceStatistics(Callback):
    """Measures at the end of a fit how much each trained parameter matters, for merging by ``Fisher`` or ``RegMean``.

    Writes ``<name>-statistics.safetensors`` beside the checkpoints, if checkpointing is on; a line says what is in it,
    what it cost, and what was left out. They are of the weights that are live when its turn comes: after an average in
    the list of callbacks those that it leaves in the model, before it the raw ones. Training goes on bit for bit as
    without it.

    - ``"fisher"``: the mean over samples of squared gradients of the loss that ``training_step`` gives of each alone,
      in eval mode: a forward and a backward pass per sample, and a copy of the weights.
    - ``"gram"``: the mean of ``x x^T`` over the inputs of each linear layer and each patch of a convolution: a forward
      pass, and d^2 numbers for a layer of d inputs.
    - ``"adam"``: the second moments that Adam has anyway, with their bias corrected: no pass. They are of gradients of
      batches, as they reached the optimizer (accumulated, averaged over processes, clipped).

    Samples are the last that were trained on, of which 256 MiB are kept in host memory; a resumed run collects again.

    Args:
        kind: ``"fisher"``, ``"gram"`` or ``"adam"``.
        samples: At most so many over all processes, whole batches of them for ``"gram"``; at least 1.
        labels: Of ``"fisher"``: ``"true"``, those of the data (the empirical Fisher information), or ``"model"``,
            drawn from what the model predicts, in the place of the targets of ``cross_entropy``, ``nll_loss`` and
            ``binary_cross_entropy_with_logits``.
        most_inputs: Of ``"gram"``: layers with more inputs d are left out, which is said; at least 1. By default the
            largest convolutions of ResNet-18 are in, at 81 MiB each.
        name: Of the file; by default the kind.

    Attributes:
        statistics: What was measured, once it was; ``None`` before, or if there was nothing.
        path: The file, if there is one.

    Raises:
        ValueError: If an argument is out of range; at fit start if the strategy shards parameters, or nothing can be
            measured; before the first step if ``training_step`` does not run outside training, or gives no loss of
            single samples for ``"fisher"``.

    Example:
        >>> ImportanceStatistics("gram", samples=512).name
        'gram'

    References:
        Matena and Raffel, "Merging models with Fisher-weighted averaging", NeurIPS 2022. Jin et al., "Dataless
        knowledge fusion by merging weights of language models" (RegMean), ICLR 2023.
    """

    def __init__(
        self,
        kind: Kind = "fisher",
        samples: int = 1024,
        labels: Labels = "true",
        most_inputs: int = 4608,
        name: str | None = None,
    ) -> None:
        self.kind: Kind = one_of("kind", kind, Kind)
        self.samples = whole("samples", samples, 1)
        self.labels: Labels = one_of("labels", labels, Labels)
        self.most_inputs = whole("most_inputs", most_inputs, 1)
        self.name = self.kind if name is None else word("name", name)
        self.statistics: Statistics | None = None
        self.path: str | None = None
        self._recent: RecentBatches | None = None
        cure = "Choose `kind='gram'` or `kind='adam'`."
        self._fisher = FisherPass("ImportanceStatistics", "`kind='fisher'`", cure, self.labels)
        self._grams = GramPass("`kind='gram'`", self.most_inputs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses what cannot work."""
        if stage != "fit":
            return
        refuse_sharding(trainer.strategy, "ImportanceStatistics")
        callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        names = [each.name for each in callbacks if isinstance(each, ImportanceStatistics)]
        if names.count(self.name) > 1:
            raise ValueError(f"`name` must be another for each ImportanceStatistics of a Trainer, got {names}.")
        later = [each.title for each in callbacks[callbacks.index(self) :] if isinstance(each, Published)]
        if later:
            rank_zero_warn(
                f"ImportanceStatistics {self.name!r} measures before {later[0]} is done, so its file will be of the raw"
                " weights and not of those that files and the module hold. To measure those, give ImportanceStatistics"
                f" after {later[0]} in the list of callbacks."
            )
        self.statistics, self.path = None, None
        self._recent = None if self.kind == "adam" else RecentBatches(batches=self.samples, bytes=_MOST)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks at the module and its optimizers, now that they are there."""
        if self.kind == "adam" and not any(map(keeps_moments, trainer.optimizers)):
            found = ", ".join(type(each).__name__ for each in trainer.optimizers) or "no optimizer"
            raise ValueError(
                f"`kind='adam'` takes the second moments of an optimizer of Adam's kind, and the run has {found}."
                " Choose `kind='fisher'`."
            )
        if self._recent is not None and self.kind == "fisher":
            self._fisher.prepare(trainer, pl_module, _held, self._recent)
        elif self._recent is not None:
            self._grams.prepare(trainer, pl_module, _held(pl_module), self._recent)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tries the step on the first batch, and copies each."""
        if self._recent is not None:
            self._recent.try_now(batch)
            self._recent.hold(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps it."""
        if self._recent is not None:
            self._recent.keep()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measures and writes. What fails is said: the weights are trained, and not lost over it."""
        began = time.perf_counter()
        try:
            self.statistics = self._measured(trainer, pl_module)
            self._recent = None
            if trainer.is_global_zero:
                self._write(trainer)
        except Exception as error:
            if trainer.world_size > 1 and not isinstance(error, ValueError | OSError):
                raise  # other processes may be waiting for this one, and must hear of it
            why = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"ImportanceStatistics: no {self.name}-statistics were written: {why}")
            return
        rank_zero_info(self._report(time.perf_counter() - began))

    def _measured(self, trainer: Any, module: LightningModule) -> Statistics:
        held, own = _held(module), -(-self.samples // trainer.world_size)
        tensors: Weights
        if self._recent is None:
            tensors, left_out = second_moments(held, trainer.optimizers)
            return Statistics.of(module, self.kind, tensors, left_out=left_out)
        if self.kind == "fisher":
            squared = self._fisher.measured(trainer, module, held, self._recent, own)
            facts: dict[str, Any] = {"samples": squared.samples, "labels": self.labels}
            return Statistics.of(module, self.kind, squared.means, **facts)
        grams, count = self._grams.measured(trainer, module, held, self._recent, own)
        tensors, samples = grams.means(), sum(gathered(count))
        return Statistics.of(module, self.kind, tensors, samples=samples, left_out=grams.left_out)

    def _write(self, trainer: Any) -> None:
        folder = getattr(trainer.checkpoint_callback, "dirpath", None)
        if self.statistics is None or folder is None or trainer.fast_dev_run:
            return
        if not is_remote(folder):
            Path(folder).mkdir(parents=True, exist_ok=True)
        path = join(folder, f"{self.name}-statistics.safetensors")
        self.statistics.write(path)
        self.path = path

    def _report(self, seconds: float) -> str:
        found = self.statistics
        if found is None:
            return "ImportanceStatistics: nothing was measured."
        of = "" if self.kind == "adam" else f" of {found.samples:,} samples"
        if self.kind != "adam" and found.samples < self.samples:
            of += f", all that were trained on or fit into {_MOST // 2**20} MiB a process,"
        if found.labels is not None:
            of += " with labels of the data" if found.labels == "true" else " with labels that the model drew"
        size = sum(t.numel() * t.element_size() for t in found.tensors.values()) / 2**20
        where = "in its `statistics`, since checkpointing is off" if self.path is None else f"in {self.path}"
        return f"ImportanceStatistics: {self.kind}{of} in {seconds:.1f} s, {size:.1f} MiB, {where}{found.omissions}"


def _held(module: LightningModule) -> Any:
    """The parameters that are trained."""
    return Selection(trainable=True).parameters(module)
