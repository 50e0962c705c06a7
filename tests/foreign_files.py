"""Checkpoints as other libraries write them: by the library where it is installed, else built as its code does."""

import argparse
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from ema_pytorch import EMA as EmaPytorch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from timm.utils import CheckpointSaver, ModelEmaV3
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.optim.swa_utils import AveragedModel
from torch.utils.data import DataLoader, TensorDataset

Sets = dict[str, dict[str, Tensor]]


class Line(LightningModule):
    """A regression with a BatchNorm layer; logs its validation loss as ``x``."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("x", mse_loss(self(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def data(n: int = 6) -> DataLoader[Any]:
    x = torch.randn(4 * n, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)


def trainer(*callbacks: Callback, epochs: int = 2, **settings: Any) -> Trainer:
    return Trainer(
        **{
            "max_epochs": epochs,
            "callbacks": list(callbacks),
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        }
        | settings
    )


def values(module: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


def lightning(folder: Path, callback: Callback, name: str, epochs: int = 2) -> Path:
    """What Lightning leaves when it runs with one of its own averaging callbacks."""
    saved = ModelCheckpoint(folder, name)
    trainer(callback, saved, epochs=epochs).fit(Line(), data(), data())
    return Path(saved.best_model_path)


def timm(folder: Path) -> tuple[Path, Sets]:
    """By timm's CheckpointSaver, with the arguments of its training script."""
    torch.manual_seed(0)
    model = Line().net
    average = ModelEmaV3(model, decay=0.5)
    step(model)
    average.update(model)
    saver = CheckpointSaver(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        args=argparse.Namespace(model="line", lr=0.1),
        model_ema=average,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
    )
    saver.save_checkpoint(3, metric=np.float64(0.5))
    return folder / "last.pth.tar", {"average": values(average.module), "raw": values(model)}


def ema_pytorch(folder: Path) -> tuple[Path, Sets]:
    model = Line().net
    average = EmaPytorch(model, beta=0.5, update_after_step=0, update_every=1)
    for _ in range(3):
        step(model)
        average.update()
    path = folder / "ema_pytorch.pt"
    torch.save({"ema": average.state_dict(), "epoch": 1}, path)
    return path, {"average": values(average.ema_model), "raw": values(model)}


def averaged_model(folder: Path) -> tuple[Path, Sets]:
    model = Line().net
    average = AveragedModel(model)
    average.update_parameters(model)
    torch.save(average.state_dict(), folder / "averaged_model.pt")
    return folder / "averaged_model.pt", {"average": values(average.module)}


def nemo(folder: Path) -> tuple[Path, Sets]:
    """NeMo's checkpoint callback writes two Lightning checkpoints, the average's name ending in ``-EMA``."""
    raw, average = Line(), Line()
    step(average.net)
    for name, module in (("nemo", raw), ("nemo-EMA", average)):
        content = {
            "state_dict": module.state_dict(),
            "pytorch-lightning_version": "2.0.0",
            "epoch": 1,
            "global_step": 9,
        }
        torch.save(content, folder / f"{name}.ckpt")
    return folder / "nemo.ckpt", {"raw": values(raw), "average": values(average)}


def mmengine(folder: Path) -> tuple[Path, Sets]:
    """MMEngine's EMAHook exchanges the two sets and saves; its message hub holds an object of a class of its own."""
    raw, average = Line().net, Line().net
    step(average)
    sets = {"average": values(average), "raw": values(raw)}
    module = ModuleType("mmengine.logging.history_buffer")

    class HistoryBuffer:
        pass

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, "HistoryBuffer"
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    names = ("mmengine", "mmengine.logging", module.__name__)
    sys.modules |= dict.fromkeys(names, module)
    history = HistoryBuffer()
    history.__dict__.update(max_length=10, _log_history=np.array([1.0, 2.0]), _count_history=np.array([1, 1]))
    content = {
        "meta": {"epoch": 1, "iter": 9, "time": "now"},
        "state_dict": sets["average"],
        "ema_state_dict": {"steps": torch.tensor(9), **{f"module.{name}": t for name, t in sets["raw"].items()}},
        "message_hub": {"log_scalars": {"loss": history}, "runtime_info": {"iter": 9}},
    }
    path = folder / "mmengine.pth"
    try:
        torch.save(content, path)
    finally:
        for name in names:
            del sys.modules[name]
    return path, sets


def step(module: nn.Module) -> None:
    """Moves every parameter, and the statistics."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter))
    module(torch.randn(8, 4))
