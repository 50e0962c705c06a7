"""The tiny runs of which there are golden files: ``write.py`` wrote them, ``test_golden.py`` reads them.

Nothing here may change what a run computes: the files beside it are of these runs, and are never written again.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_merge import callbacks as merging
from lightning_merge import combiners, compat
from lightning_merge.branches import Combine, SoftmaxOfScores
from lightning_merge.rules import EmaPytorchWarmup, ExponentialMean, Mean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection

HERE = Path(__file__).parent
ARCHIVE = HERE / "6af3a7e.tar.xz"

EPOCHS, BATCHES = 3, 4
FULL, WEIGHTS, FINAL = "full-step=7.ckpt", "weights-step=8.ckpt", "ema-final.ckpt"
"""A full file amid the second of three epochs of four steps, a weights-only one after the validation at its end."""

ANCHOR = "anchor.pt"
"""The file in which Anchor keeps what it measures at the end of a run."""


class Tiny(pl.LightningModule):
    """22 parameters with BatchNorm, a loss per task where asked, and dropout where random numbers are the point."""

    def __init__(self, tasks: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Dropout(dropout), nn.Linear(3, 1))
        _fill(self)
        self.tasks = tasks
        self.validated: list[dict[str, Tensor]] = []

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Any:
        found = self.net(batch[0])
        loss = nn.functional.mse_loss(found, batch[1])
        return {"losses": {"sum": loss, "size": found.square().mean()}} if self.tasks else loss

    def calibration_step(self, batch: list[Tensor]) -> None:
        self.net(batch[0])

    def score_step(self, batch: list[Tensor]) -> tuple[Tensor, int]:
        return -nn.functional.mse_loss(self.net(batch[0]), batch[1], reduction="sum"), len(batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.validated.append(tensors(self))
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


class Plain(Tiny):
    """Without BatchNorm, for FSDP2, which shares out its first layer."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 1))
        _fill(self)

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]), sync_dist=True)

    def configure_model(self) -> None:
        from torch.distributed.fsdp import fully_shard

        if self.device_mesh is not None and not any(hasattr(p, "to_local") for p in self.parameters()):
            fully_shard(self.net[0], mesh=self.device_mesh["data_parallel"])
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


def _fill(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)


def data(seed: int = 0) -> TensorDataset:
    """16 samples."""
    inputs = torch.randn(BATCHES * 4, 3, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs.sum(1, keepdim=True).sign())


def loaders(seed: int = 0, **settings: Any) -> tuple[StatefulDataLoader[Any], StatefulDataLoader[Any]]:
    return StatefulDataLoader(data(seed), batch_size=4, **settings), StatefulDataLoader(data(seed), batch_size=8)


def _elsewhere(distance: float) -> dict[str, Tensor]:
    return {name: tensor - distance for name, tensor in tensors(Tiny()).items()}


METHODS: dict[str, Callable[[], list[Any]]] = {
    "ema": lambda: [merging.EMA(decay=0.8, validate="both")],
    "ema-compensated": lambda: [merging.EMA(half_life="20%", compensated=True, warmup="timm")],
    "swa": lambda: [merging.SWA(start_epoch=0, swa_lr=0.02, anneal_epochs=2)],
    "lawa": lambda: [merging.LAWA(k=2, every_n_steps=3)],
    "lawa-disk": lambda: [merging.LAWA(k=2, every_n_steps=3, store="disk", directory="window")],
    "swad": lambda: [merging.SWAD("val/loss", n_converge=1, n_tolerance=2, stop=False, validate="both")],
    "sma": lambda: [merging.SMA("val/loss", start_step=2)],
    "aswa": lambda: [merging.ASWA("val/loss", start_epoch=0, validate="both")],
    "aswa-hard": lambda: [merging.ASWA("val/loss", start_epoch=0, hard=True)],
    "twa": lambda: [merging.TWA(every=2, stage="50%", lr=0.05, inner="adamw")],
    "twa-before-its-stage": lambda: [merging.TWA(every=2, stage="25%", lr=0.05)],
    "posthoc-ema": lambda: [merging.PostHocEMA(every=4)],
    "posthoc-ema-folder": lambda: [merging.PostHocEMA(every=4, directory="copies")],
    "interpolate": lambda: [merging.Interpolate(0.4)],
    "extrapolate": lambda: [merging.Extrapolate(1.3, selection=Selection())],
    "weight-merging": lambda: [
        merging.WeightMerging(Mean(), EveryNSteps(2), Selection(include=("net.0.*", "net.1.*"), buffers="copy"))
    ],
    "two-averages": lambda: [
        merging.EMA(0.8),
        merging.WeightMerging(ExponentialMean(0.7, warmup=EmaPytorchWarmup()), name="warm", validate="both"),
        merging.LAWA(k=2, every_n_steps=2, store="cpu"),
    ],
    "compat": lambda: [compat.EMAWeightAveraging(decay=0.8)],
    "compat-swa": lambda: [compat.StochasticWeightAveraging(swa_lrs=0.02, swa_epoch_start=1)],
    "lookaround": lambda: [merging.Lookaround(2, 3, validate="both")],
    "lookaround-turns": lambda: [merging.Lookaround(2, 2, batches="turns", buffers="average")],
    "forkmerge": lambda: [merging.ForkMerge({"one": {"sum": 1.0}, "both": {"sum": 1.0, "size": 0.5}}, 3)],
    "papa": lambda: [merging.PAPA(2, 3, pull=0.1)],
    "wash": lambda: [merging.WASH(2, 2, share=0.2)],
    "dart": lambda: [merging.DART(2, 4, start=3)],
    "localsgd": lambda: [merging.LocalSGD(2, 3, start=4)],
    "diloco": lambda: [merging.DiLoCo(2, 3)],
    "warp": lambda: [merging.WARP(2, 3, decay=0.8)],
    "branching": lambda: [merging.Branching(Combine(combiners.ModelStock(), base="start"), EveryNSteps(3), 2)],
    "branching-by-score": lambda: [merging.Branching(SoftmaxOfScores(), EveryNSteps(3), 2, optimizer_state="average")],
    "ondare": lambda: [merging.OnlineMerging("ondare", _elsewhere(0.1), density=0.5, alpha=0.02), merging.EMA(0.8)],
    "onties": lambda: [merging.OnlineMerging("onties", _elsewhere(0.1), density=0.5, alpha=0.02, merge_every=2)],
    "anchor": lambda: [merging.Anchor(1.0, importance="fisher", file=ANCHOR), merging.EMA(0.8)],
    "accept-if-better": lambda: [merging.AcceptIfBetter("val/loss"), merging.EMA(0.5)],
    "random-state": lambda: [merging.RandomState(), merging.EMA(0.8)],
    "none": lambda: [],
}
"""Callbacks of a run by its name. The last one is the yardstick: a run that has nothing to do with lightning-merge."""


def module(method: str) -> Tiny:
    return Tiny(tasks=method == "forkmerge", dropout=0.3 if method == "random-state" else 0.0)


def tensors(weights: Any) -> dict[str, Tensor]:
    """Copies of a module's tensors, or of named ones; of sharded ones the part that is here."""
    named = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return {n: (t.to_local() if hasattr(t, "to_local") else t).detach().clone() for n, t in named.items()}


def averages(callbacks: list[Any]) -> list[Any]:
    return [callback for callback in callbacks if hasattr(callback, "merged_weights")]


def standing(network: nn.Module, callbacks: list[Any]) -> dict[str, Any]:
    """The module, and what its averages hold, by what a user may ask of them."""
    return {
        "module": tensors(network),
        "averages": {
            average.name: {
                "merged": tensors(average.merged_weights() or {}),
                "raw": tensors(average.raw_weights()),
                "updates": average.updates,
                "steps": average.steps,
                "window": average.update_window,
            }
            for average in averages(callbacks)
        },
    }


class Witness(Checkpoint):
    """How things stand when training starts and right after the full file; comes after all other callbacks."""

    def __init__(self, callbacks: list[Any], keep: Callable[[], Any] | None = None, epoch: int = 1) -> None:
        self.callbacks = callbacks
        self.keep = keep
        self.epoch = epoch
        self.started: dict[str, Any] = {}
        self.last: dict[str, Tensor] = {}
        self.validated: list[dict[str, Tensor]] = []
        self.saved: dict[str, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.started = standing(pl_module, self.callbacks)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == self.epoch and batch_idx == 2:
            self.saved = standing(pl_module, self.callbacks)
            if self.keep is not None:
                self.keep()
        self.last = tensors(pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
        self.validated = pl_module.validated


def fit(
    method: str,
    folder: Path,
    ckpt_path: Path | None = None,
    epochs: int = EPOCHS,
    keep: Callable[[], Any] | None = None,
) -> tuple[Witness, dict[str, Any]]:
    """One run: what was seen on the way, and how things stand at its end.

    Args:
        method: Which of ``METHODS``.
        folder: Where it works; also the current folder, for stores of the method.
        ckpt_path: A full file to go on from.
        epochs: Of the whole run.
        keep: Called right after the full file was written; only with it the two files are written.
    """
    torch.set_num_threads(1)
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    callbacks, network = METHODS[method](), module(method)
    witness = Witness(callbacks, keep)
    files = [
        ModelCheckpoint(folder, "full-{step}", every_n_train_steps=7, save_top_k=-1),
        ModelCheckpoint(folder, "weights-{step}", monitor="val/loss", every_n_epochs=2, save_weights_only=True),
    ]
    extra = [] if keep is None else files
    trainer = pl.Trainer(
        **quiet(folder), max_epochs=epochs, callbacks=[*callbacks, *extra, witness], enable_checkpointing=True
    )
    trainer.fit(network, *loaders(shuffle=method == "random-state"), ckpt_path=ckpt_path)
    momenta = [state["momentum_buffer"].clone() for state in trainer.optimizers[0].state_dict()["state"].values()]
    anchor = torch.load(ANCHOR) if Path(ANCHOR).exists() else {}
    return witness, {**standing(network, callbacks), "momenta": momenta, "anchor": anchor}


def quiet(folder: Path) -> dict[str, Any]:
    return {
        "default_root_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
