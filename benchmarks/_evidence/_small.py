"""Handwritten digits in memory, and a network of three layers: a run on one thread takes seconds."""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from _evidence._fit import Part


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


def perceptron(width: int = 64) -> nn.Sequential:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, 10),
    )


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
