"""Wide residual networks for 32x32 images."""

from torch import Tensor, nn

from lightning_merge._checks import LISTED, whole


class WideResNet(nn.Sequential):
    """The wide residual network WRN-``depth``-``widen``: three stages of blocks whose BatchNorm and ReLU come first.

    The stages have 16, 32 and 64 times ``widen`` channels. WRN-16-4 has 2.7 million parameters, WRN-28-10 36.5. It is
    for a GPU; ``--model.model lightning_merge.recipes.WideResNet --model.model.depth 28`` puts one into a recipe.

    Args:
        num_classes: Logits per image; at least 2.
        depth: Layers, 4 more than a multiple of 6; at least 10.
        widen: Factor of the channels; at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> WideResNet(widen=1)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    References:
        Zagoruyko and Komodakis, "Wide residual networks", BMVC 2016, table 1. Without dropout.
    """

    def __init__(self, num_classes: int = 10, depth: int = 16, widen: int = 4) -> None:
        num_classes, widen = whole("num_classes", num_classes, 2, LISTED), whole("widen", widen, 1, 1000)
        blocks, rest = divmod(whole("depth", depth, 10, 10_000) - 4, 6)
        if rest:
            raise ValueError(f"`depth` must be 4 more than a multiple of 6, as 16 or 28, got {depth}.")
        widths = [16, *(widen << stage for stage in (4, 5, 6))]
        stages = [
            _Block(widths[stage + (block > 0)], widths[stage + 1], stride=2 if stage and block == 0 else 1)
            for stage in range(3)
            for block in range(blocks)
        ]
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1, bias=False),
            *stages,
            nn.BatchNorm2d(widths[-1]),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(widths[-1], num_classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.num_classes = num_classes


class _Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
        self.branch = nn.Sequential(
            nn.Conv2d(channels, out, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(out),
            nn.ReLU(inplace=True),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
        )
        same = channels == out and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels, out, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        active = self.first(images)
        kept = images if self.shortcut is None else self.shortcut(active)
        result: Tensor = kept + self.branch(active)
        return result
