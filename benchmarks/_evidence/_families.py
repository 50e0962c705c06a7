"""Six tasks of three kinds of images: photographs of CIFAR-10 and Tiny ImageNet, and digits of scikit-learn."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from _shared import progress
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.datasets import ImageFolder

from lightning_merge.recipes.vision._cifar import in_turn
from lightning_merge.recipes.vision._image_folders import open_folders

Parts = dict[str, tuple[Tensor, Tensor]]
"""Pixels and labels from 0 on of ``train``, ``val`` and ``test``."""

CIFAR, TINY = "cifar10", "tiny-imagenet-50"


def families(data: Path, images: int, val_images: int, test_images: int) -> dict[str, Parts]:
    """The tasks by name: two halves of CIFAR-10, twice ten classes of Tiny ImageNet, two halves of the digits.

    Args:
        data: Folder that holds ``cifar10/`` and ``tiny-imagenet-50/``.
        images: Of each task's training part, equally many of each class.
        val_images: Of each validation part, which are training images too.
        test_images: Of each test part.

    Raises:
        FileNotFoundError: If there are no images.
    """
    progress("reading images")
    counts = (images, val_images, test_images)
    cifar, tiny = open_folders(data / CIFAR, "train", "test"), open_folders(data / TINY, "train", "val")
    return {
        "CIFAR-10, first classes": _of_folders(cifar, range(5), counts),
        "CIFAR-10, last classes": _of_folders(cifar, range(5, 10), counts),
        "Tiny ImageNet, first classes": _of_folders(tiny, range(10), counts),
        "Tiny ImageNet, last classes": _of_folders(tiny, range(40, 50), counts),
        "digits 0 to 4": _of_digits(range(5), counts),
        "digits 5 to 9": _of_digits(range(5, 10), counts),
    }


def _of_folders(folders: tuple[ImageFolder, ImageFolder], classes: Sequence[int], counts: tuple[int, ...]) -> Parts:
    images, val_images, test_images = counts
    train = _chosen(folders[0], classes, images + val_images)
    return {
        "train": (train[0][val_images:], train[1][val_images:]),
        "val": (train[0][:val_images], train[1][:val_images]),
        "test": _chosen(folders[1], classes, test_images),
    }


def _chosen(folder: ImageFolder, classes: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
    own = [(path, label - classes[0]) for path, label in folder.samples if label in classes]
    labels = torch.tensor([label for _, label in own])
    order = in_turn(labels, 0)[:count]
    pixels = torch.stack([_pixels(own[index][0]) for index in order.tolist()])
    return pixels, labels[order]


def _pixels(path: str) -> Tensor:
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _of_digits(classes: Sequence[int], counts: tuple[int, ...]) -> Parts:
    digits = load_digits()
    own = torch.from_numpy(np.isin(digits.target, classes))
    labels = torch.from_numpy(digits.target).long()[own] - classes[0]
    order = in_turn(labels, 0)
    grey = torch.from_numpy(digits.images)[own][order] * (255 / 16)
    pixels, labels = grey.to(torch.uint8).unsqueeze(1).expand(-1, 3, -1, -1).contiguous(), labels[order]
    val, test = counts[1], counts[1] + min(counts[2], len(labels) // 3)
    train = slice(test, test + counts[0])
    parts = {"train": train, "val": slice(val), "test": slice(val, test)}
    return {part: (pixels[where], labels[where]) for part, where in parts.items()}
