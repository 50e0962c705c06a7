"""Three views of small images, and batches that come in one after the other."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from _evidence._fit import Part


def shifted(batch: Part) -> Part:
    """Each image moved by up to a pixel each way."""
    images, labels = batch
    return _moved(images, shift=2.0 / images.shape[-1]), labels


def turned(batch: Part) -> Part:
    """Each image turned by up to 17 degrees and scaled by up to 15 %."""
    images, labels = batch
    return _moved(images, angle=0.3, scale=0.15), labels


def spoilt(batch: Part) -> Part:
    """Each image with a square of 3 x 3 pixels in black and with noise of a tenth."""
    images, labels = batch
    size = images.shape[-1]
    top, left = torch.randint(size - 2, (2, len(images), 1))
    row = torch.arange(size)
    rows, columns = (row >= top) & (row < top + 3), (row >= left) & (row < left + 3)
    hole = (rows[:, :, None] & columns[:, None, :])[:, None]
    return images.masked_fill(hole, 0.0) + 0.1 * torch.randn_like(images), labels


VIEWS = (shifted, turned, spoilt)


class InTurn:
    """The batches of a loader, batch ``t`` of the run in view ``t mod 3``."""

    def __init__(self, batches: Iterable[Part], views: Sequence[Any] = VIEWS) -> None:
        self.batches, self.views, self.seen = batches, views, 0

    def __len__(self) -> int:
        return len(self.batches)  # type: ignore[arg-type]  # of a DataLoader

    def __iter__(self) -> Iterator[Part]:
        for batch in self.batches:
            self.seen += 1
            yield self.views[(self.seen - 1) % len(self.views)](batch)


def _moved(images: Tensor, angle: float = 0.0, scale: float = 0.0, shift: float = 0.0) -> Tensor:
    draws = 2 * torch.rand(4, len(images)) - 1
    angles, scales = angle * draws[0], 1 + scale * draws[1]
    first = torch.stack([scales * angles.cos(), -scales * angles.sin(), shift * draws[2]], 1)
    second = torch.stack([scales * angles.sin(), scales * angles.cos(), shift * draws[3]], 1)
    grid = affine_grid(torch.stack([first, second], 1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)
