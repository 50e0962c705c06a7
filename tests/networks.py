"""A small network with its data, and whether two sets of weights are the same: plain torch, for all tests."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


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


def batches(n: int = 4, size: int = 4, seed: int = 1, **settings: Any) -> DataLoader[tuple[Tensor, Tensor]]:
    """``n`` batches for ``Net``, always the same."""
    inputs = torch.randn(n * size, 4, generator=torch.Generator().manual_seed(seed))
    return DataLoader(TensorDataset(inputs, inputs.sum(1, keepdim=True).sin()), batch_size=size, **settings)


def values(weights: Any) -> dict[str, Tensor]:
    """A copy of a module's or a file's tensors."""
    tensors = weights.state_dict() if isinstance(weights, nn.Module) else weights
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def differing(left: Any, right: Any) -> list[str]:
    """Names of the tensors that are not the same bits in two sets of weights."""
    left, right = values(left), values(right)
    both = left.keys() & right.keys()
    return sorted((left.keys() ^ right.keys()) | {name for name in both if not torch.equal(left[name], right[name])})
