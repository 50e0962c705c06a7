"""The smallest modules and Trainers that show a fact about the callbacks.

``Walk`` is for exact numbers: one weight that grows by a known amount per optimizer step. ``Net`` is for the rest: a
few layers, a real loss, BatchNorm if asked. Both work under ``lightning.pytorch`` and under ``pytorch_lightning``.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import lightning.pytorch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class WalkParts:
    """One weight ``w`` that grows by ``growth[epoch] * lr`` at every step; ``val/w`` is the weight that was validated.

    With a learning rate of 1 and growths that float32 can hold, every number is exact.
    """

    def __init__(self, growth: tuple[float, ...] = (1.0,), start: float = 0.0, lr: float = 1.0) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((1,), start))
        self.growth = growth
        self.lr = lr

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        growth = self.growth[min(self.current_epoch, len(self.growth) - 1)]
        return -(self.w * growth).sum()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/w", self.w.detach().float().sum())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class NetParts:
    """A regression on four features; logs ``val/loss`` and ``train/loss``."""

    def __init__(self, norm: bool = False, lr: float = 0.1) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8) if norm else nn.Tanh(), nn.Linear(8, 1))
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss", self.loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.mse_loss(self(batch[0]), batch[1])


@cache
def of(parts: type, package: ModuleType = lightning.pytorch) -> type:
    """The LightningModule class of this package that has these parts."""
    return type(parts.__name__.removesuffix("Parts"), (parts, package.LightningModule), {})


Walk = of(WalkParts)
Net = of(NetParts)


def steps(n: int) -> DataLoader[Tensor]:
    """``n`` batches for ``Walk``, which does not look at them."""
    return DataLoader([torch.zeros(1)] * n, batch_size=None)


def batches(n: int = 4, size: int = 4, seed: int = 1, **settings: Any) -> DataLoader[tuple[Tensor, Tensor]]:
    """``n`` batches for ``Net``, always the same."""
    inputs = torch.randn(n * size, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True).sin()), batch_size=size, **settings)


def trainer(root: Path, callbacks: Sequence[Any] = (), package: ModuleType = lightning.pytorch, **settings: Any) -> Any:
    """A quiet Trainer on the CPU that writes checkpoints only if a callback does."""
    return package.Trainer(
        **{
            "default_root_dir": root,
            "callbacks": list(callbacks),
            "accelerator": "cpu",
            "devices": 1,
            "logger": False,
            "enable_checkpointing": any(c.__name__ == "Checkpoint" for cb in callbacks for c in type(cb).__mro__),
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "num_sanity_val_steps": 0,
        }
        | settings
    )


def read(path: str | Path) -> dict[str, Any]:
    """A checkpoint, read as a user without lightning-merge would."""
    return torch.load(path, weights_only=True)


def raw_of(file: dict[str, Any]) -> dict[str, Tensor]:
    """The raw weights of a full file: those that its ``state_dict`` does not hold itself are set aside."""
    return file["state_dict"] | file["lightning_merge"]["raw"]


def values(weights: Any) -> dict[str, Tensor]:
    """A copy of a module's or a file's tensors."""
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differing(left: Any, right: Any) -> list[str]:
    """Names of the tensors that are not the same bits in two sets of weights."""
    left, right = values(left), values(right)
    both = left.keys() & right.keys()
    return sorted((left.keys() ^ right.keys()) | {name for name in both if not torch.equal(left[name], right[name])})


def score(weights: Any, norm: bool = False, loader: DataLoader[Any] | None = None) -> float:
    """What ``val/loss`` is for these weights, by a plain loop over a fresh module."""
    module = Net(norm=norm)
    module.load_state_dict(weights)
    module.eval()
    with torch.no_grad():
        losses = [module.loss(batch) for batch in loader or validation()]
    return torch.stack(losses).mean().item()


def validation() -> DataLoader[list[Tensor]]:
    """Two batches of eight that are never trained on."""
    return batches(2, size=8, seed=2)
