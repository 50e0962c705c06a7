"""Handwritten digits in memory, and a network of three layers: a run on one thread takes seconds."""

from collections.abc import Callable
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from _evidence._fit import Part
from lightning_merge.recipes import Digits


def digits(*sizes: int, seed: int = 0) -> list[Part]:
    """So many images each (8x8, values in [0, 1]) and their labels, no image twice; one more part for what is left.

    Args:
        sizes: Images of each part.
        seed: Chooses which images are in which part.
    """
    found = load_digits()
    images = torch.from_numpy(found.images).float().div(16).unsqueeze(1)
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split([*sizes, len(labels) - sum(sizes)])
    return [(images[part], labels[part]) for part in parts]


def parts_of_recipe() -> dict[str, Part]:
    """``train``, ``val`` and ``test`` of the recipes' digits, whose classes have equal shares in each."""
    data = Digits(shift=0)
    for stage in ("fit", "test"):
        data.setup(stage)
    return {"train": (data.train.images, data.train.labels), "val": data.val.tensors, "test": data.test.tensors}


def perceptron(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def momentum_sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
    return lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9)


def copied(module: nn.Module) -> dict[str, Tensor]:
    """What a module holds, in host memory."""
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
