"""Augmentations of whole batches, for branches that each see a batch in their own way."""

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_merge._checks import function, one_of, whole
from lightning_merge.recipes.vision._pixels import COLOURS


class Augmented:
    """A batch ``(images, ...)`` whose images went through a transform of torchvision, on the device they are on.

    Args:
        transform: Maps images of shape (N, C, H, W) to such images, as ``torchvision.transforms.v2`` does; all N in the
            same way. ``None`` leaves the batch as it is.
        colours: Whose colours images were scaled by: ``"cifar10"``, ``"cifar100"`` or ``"imagenet"``. The transform
            then gets bytes, as AutoAugment and RandAugment want them. ``None`` hands it the images as they are.
        images_per_draw: Images that one draw of the transform is for; at least 1. More are faster and less diverse.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> images, labels = Augmented(lambda images: images.flip(-1))([torch.arange(4.0).view(1, 1, 2, 2), None])
        >>> images
        tensor([[[[1., 0.],
                  [3., 2.]]]])
    """

    def __init__(
        self,
        transform: Callable[[Any], Any] | None = None,
        colours: Literal["cifar10", "cifar100", "imagenet"] | None = None,
        images_per_draw: int = 1,
    ) -> None:
        says = f"one of {', '.join(map(repr, COLOURS))} or None"
        self.transform = None if transform is None else function("transform", transform)
        self.colours = one_of("colours", colours, (*COLOURS, None), says)
        self.images_per_draw = whole("images_per_draw", images_per_draw, 1)

    def __call__(self, batch: Any) -> Any:
        """Transforms the images of a batch, and leaves its other entries alone."""
        if self.transform is None:
            return batch
        images, *rest = batch
        if self.colours is None:
            return [self._drawn(images), *rest]
        mean, std = (torch.tensor(c, device=images.device).view(3, 1, 1) for c in COLOURS[self.colours])
        pixels = ((images * std + mean) * 255).round().clamp(0, 255).byte()
        return [((self._drawn(pixels).to(images.dtype) / 255) - mean) / std, *rest]

    def _drawn(self, images: Tensor) -> Tensor:
        assert self.transform is not None
        return torch.cat([self.transform(part) for part in torch.split(images, self.images_per_draw)])
