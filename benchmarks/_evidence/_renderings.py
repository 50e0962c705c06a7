"""Photographs of CIFAR-10 in renderings that stand for domains; no two of them share a training image."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _shared import progress
from torch import Tensor
from torchvision.transforms.v2 import functional

from lightning_merge.recipes import CIFAR


def _edges(pixels: Tensor) -> Tensor:
    """Dark lines on white, as in a sketch."""
    grey = functional.rgb_to_grayscale(pixels).float()
    down, right = grey.diff(dim=2, append=grey[:, :, -1:]), grey.diff(dim=3, append=grey[..., -1:])
    lines = 255 - 3 * (down.square() + right.square()).sqrt()
    return lines.clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)


RENDERINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "photographs": lambda pixels: pixels,
    "edges": _edges,
    "posterised": lambda pixels: functional.posterize(pixels, 2),
    "inverted": functional.invert,
    "blurred": lambda pixels: functional.gaussian_blur(pixels, [7, 7], [1.5, 1.5]),
}


def rendered(
    data: Path, names: Sequence[str], images: int, test_images: int
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Pixels and labels, by rendering and part (``train`` and ``test``), equally many of each class.

    Args:
        data: Folder that holds ``cifar10/``.
        names: Of ``RENDERINGS``.
        images: Of each rendering, of CIFAR-10's training images.
        test_images: Of each rendering, of CIFAR-10's test images; all renderings have the same ones.

    Raises:
        FileNotFoundError: If there are no images.
    """
    root = data / "cifar10"
    if not root.is_dir():
        raise FileNotFoundError(f"no CIFAR-10 in {root}: say with --data which folder holds cifar10/.")
    progress(f"reading {len(names) * images} images and the test images")
    cifar = CIFAR("cifar10", root=str(root), train_images=len(names) * images, val_images=0)
    cifar.setup("fit")
    cifar.setup("test")
    train, test = (cifar.train.pixels, cifar.train.labels), (cifar.test.pixels, cifar.test.labels)
    shown = torch.cat([(test[1] == label).nonzero()[: test_images // 10, 0] for label in range(10)])
    found = {}
    for number, name in enumerate(names):
        # The images come class by class in turn, so every stretch of a multiple of 10 has equally many of each.
        own = slice(number * images, (number + 1) * images)
        render = RENDERINGS[name]
        found[name] = {
            "train": (render(train[0][own]).contiguous(), train[1][own]),
            "test": (render(test[0][shown]).contiguous(), test[1][shown]),
        }
    return found
