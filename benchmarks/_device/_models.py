"""Models, batches and Trainers of the measurements."""

from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from _shared import QUIET
from torch import Tensor, nn
from torch.nn import functional as F

from _device._session import Session


class Batches:
    """The same batch, which is on the device, so many times."""

    def __init__(self, batch: Any, count: int) -> None:
        self.batch, self.count = batch, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        return iter([self.batch] * self.count)


class Images(pl.LightningModule):
    """A classifier, stepped by SGD with momentum."""

    def __init__(self, net: nn.Module, adamw: bool = False) -> None:
        super().__init__()
        self.net, self.adamw = net, adamw

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", F.cross_entropy(self.net(batch[0]), batch[1]), batch_size=len(batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.adamw:
            return torch.optim.AdamW(self.parameters(), lr=1e-4, fused=True)
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)


class OneSum(pl.LightningModule):
    """A step that costs nothing: the gradient of one parameter, a learning rate of 0."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.cpu = lambda: self  # stays where it is after the fit, which would copy gigabytes

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return min(self.net.parameters(), key=lambda p: p.numel()).float().sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class Block(nn.Module):
    """A block of a transformer as far as its parameters go."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.proj(self.qkv(self.norm1(x))[..., : x.shape[-1]])
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


def stack(session: Session, width: int, layers: int) -> nn.Module:
    """So many blocks."""
    torch.manual_seed(0)
    with session.device:
        return nn.Sequential(*(Block(width) for _ in range(layers)))


def net(session: Session, name: str, **settings: Any) -> nn.Module:
    """A model of timm; off CUDA one of a few layers in its place."""
    torch.manual_seed(0)
    if session.tiny:
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, settings.get("num_classes", 1000)))
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *head)
    return timm.create_model(name, pretrained=False, **settings).to(session.device)


def images(session: Session, count: int, pixels: int, classes: int) -> list[Tensor]:
    """A batch of random images."""
    shape = (count, 3, pixels, pixels)
    device = session.device
    return [torch.randn(shape, device=device), torch.randint(classes, (count,), device=device)]


def trainer(session: Session, callbacks: list[pl.Callback], **settings: Any) -> pl.Trainer:
    """A Trainer that prints and writes nothing."""
    quiet = {**QUIET, "accelerator": "gpu" if session.cuda else "cpu", "devices": 1, "num_sanity_val_steps": 0}
    chosen = {"default_root_dir": Path(gettempdir()) / "device", **quiet, **settings}
    return pl.Trainer(callbacks=callbacks, **chosen)


class InFit(pl.Callback):
    """Calls a function with everything live, after the last step; first in the list, so before an average publishes."""

    def __init__(self, session: Session, what: str, function: Callable[[pl.Trainer, Any], None]) -> None:
        self.session, self.what, self.function = session, what, function

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        with self.session.guarded(self.what):
            self.function(trainer, pl_module)
