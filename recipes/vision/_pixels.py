"""Small images in memory: whole batches are moved, mirrored and scaled at once."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import Dataset

from lightning_merge.recipes.vision._loading import Batch

# Mean and standard deviation of red, green and blue over the training images.
COLOURS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class Images(Dataset[Batch]):
    """Pixels in memory; whole batches are moved, mirrored (both only with ``padding``) and scaled at once.

    Args:
        pixels: Of shape (N, 3, H, W), uint8.
        labels: Of shape (N,).
        mean: Of each colour, in [0, 1].
        std: Of each colour.
        padding: Images are moved by up to so many pixels; black comes in.
    """

    def __init__(
        self, pixels: Tensor, labels: Tensor, mean: Sequence[float], std: Sequence[float], padding: int
    ) -> None:
        self.pixels = pixels
        self.labels = labels
        self.mean = 255 * torch.tensor(mean).view(3, 1, 1)
        self.scale = 1 / (255 * torch.tensor(std).view(3, 1, 1))
        self.padding = padding

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        pixels, labels = self.__getitems__([index])
        return pixels[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """The batch of these images; ``DataLoader`` asks for it instead of one image at a time."""
        pixels = self.pixels[indices]
        if self.padding:
            pixels = _moved_and_mirrored(pixels, self.padding)
        return (pixels - self.mean) * self.scale, self.labels[indices]


def _moved_and_mirrored(pixels: Tensor, padding: int) -> Tensor:
    count, colours, height, width = pixels.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1))
    mirrored = torch.rand(count, 1) < 0.5
    rows = top + torch.arange(height)
    columns = left + torch.where(mirrored, torch.arange(width - 1, -1, -1), torch.arange(width))
    plane = torch.arange(count * colours).view(count, colours, 1, 1)
    index = (plane * (height + 2 * padding) + rows[:, None, :, None]) * (width + 2 * padding) + columns[
        :, None, None, :
    ]
    return pad(pixels, (padding,) * 4).take(index)  # several times as fast as an index per dimension


def decoded(file: str) -> Tensor:
    """The pixels of an image file, of shape (3, 32, 32).

    Raises:
        ValueError: If it cannot be read or has another size.
    """
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{file} is not an image that can be read ({type(error).__name__}). Remove it.") from error
    if pixels.shape[:2] != (32, 32):
        raise ValueError(f"images must be 32x32, {file} is {pixels.shape[1]}x{pixels.shape[0]}.")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def whole_batches(batch: Batch) -> Batch:
    """What ``Images`` gave is a batch already."""
    return batch
