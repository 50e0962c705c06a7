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
from networks import NetParts, batches
from networks import differing as differing
from networks import values as values
from torch import Tensor, nn
from torch.utils.data import DataLoader


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


@cache
def of(parts: type, package: ModuleType = lightning.pytorch) -> type:
    """The LightningModule class of this package that has these parts."""
    return type(parts.__name__.removesuffix("Parts"), (parts, package.LightningModule), {})


Walk = of(WalkParts)
Net = of(NetParts)


def steps(n: int) -> DataLoader[Tensor]:
    """``n`` batches for ``Walk``, which does not look at them."""
    return DataLoader([torch.zeros(1)] * n, batch_size=None)


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
