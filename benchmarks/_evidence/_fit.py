"""A run of a Trainer on tensors in memory, and accuracy on tensors."""

from collections.abc import Callable, Mapping, Sequence
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import QUIET
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from lightning_merge.callbacks import WeightMerging
from lightning_merge.recipes import Classifier
from lightning_merge.recipes.vision._pixels import whole_batches

Part = tuple[Tensor, Tensor]
"""Inputs and labels."""


class Tensors(Dataset[Part]):
    """Inputs and labels in memory, taken a batch at a time."""

    def __init__(self, part: Part) -> None:
        self.inputs, self.labels = part

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Part:
        return self.inputs[indices], self.labels[indices]


def loader(part: Part, batch: int, training: bool = False) -> DataLoader[Part]:
    return DataLoader(Tensors(part), batch, shuffle=training, drop_last=training, collate_fn=whole_batches)


def fit(
    network: nn.Module,
    train: DataLoader[Any],
    *,
    optimizer: Callable[[Any], torch.optim.Optimizer],
    steps: int,
    seed: int,
    device: str,
    classes: int = 10,
    schedule: Callable[[Any], Any] | None = None,
    smoothing: float = 0.0,
    callbacks: Sequence[pl.Callback] = (),
    val: DataLoader[Any] | None = None,
    val_every: int = 0,
) -> Classifier:
    """Trains for so many steps, with batches in an order that follows from the seed; the module as the run left it."""
    module = Classifier(network, classes, smoothing, optimizer, schedule, "step")
    pl.seed_everything(seed, verbose=False)
    with TemporaryDirectory() as folder:  # for what callbacks write
        trainer = pl.Trainer(
            **{**QUIET, "accelerator": "cpu" if device == "cpu" else "gpu"},
            default_root_dir=folder,
            max_steps=steps,
            max_epochs=-1,
            callbacks=[*callbacks],
            num_sanity_val_steps=0,
            **({"limit_val_batches": 0} if val is None else {}),
            **({"val_check_interval": val_every, "check_val_every_n_epoch": None} if val_every else {}),
        )
        trainer.fit(module, train, val)
    return module.to(device)


def every_set(averages: Mapping[str, WeightMerging], raw: str) -> dict[str, Mapping[str, Tensor]]:
    """After a fit: the weights of each average, raw ones where it has none, and the raw ones as ``raw``."""
    plain: dict[str, Tensor] = {}
    for average in averages.values():
        plain |= average.raw_weights()
    return {raw: plain, **{name: {**plain, **(each.merged_weights() or {})} for name, each in averages.items()}}


@torch.no_grad()
def accuracy(module: nn.Module, weights: Mapping[str, Tensor], part: Part, device: str) -> float:
    """Percent of the inputs that a module with these weights names right."""
    return 100 * float((logits(module, weights, part[0], device).argmax(1) == part[1]).float().mean())


@torch.no_grad()
def logits(module: nn.Module, weights: Mapping[str, Tensor], inputs: Tensor, device: str) -> Tensor:
    module.load_state_dict({**module.state_dict(), **weights})
    module.eval().to(device)
    return torch.cat([module(each.to(device)).cpu() for each in inputs.split(500)])
