"""A residual network for 32x32 images that two CPU cores can train."""

from torch import Tensor, nn

from lightning_merge._checks import LISTED, whole


class SmallResNet(nn.Sequential):
    """The CIFAR network of He et al.: a convolution, three stages of residual blocks, a mean over the image, a head.

    It has ``6 * blocks + 2`` layers; the stages have ``width``, twice and four times as many channels. ResNet-8
    (``blocks=1, width=16``) has 78,000 parameters, ResNet-20 (``blocks=3``) 270,000.

    Args:
        num_classes: Logits per image; at least 2.
        blocks: Residual blocks per stage; at least 1.
        width: Channels of the first stage; at least 1.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> import torch
        >>> SmallResNet()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    References:
        He et al., "Deep residual learning for image recognition", CVPR 2016, section 4.2. The shortcuts that change the
        shape are 1x1 convolutions (its option B) here.
    """

    def __init__(self, num_classes: int = 10, blocks: int = 1, width: int = 16) -> None:
        num_classes = whole("num_classes", num_classes, 2, LISTED)
        blocks, width = whole("blocks", blocks, 1, 1000), whole("width", width, 1, 10_000)
        stages = [
            _Residual(width << max(stage - (block == 0), 0), width << stage, stride=2 if stage and block == 0 else 1)
            for stage in range(3)
            for block in range(blocks)
        ]
        super().__init__(
            _convolution(3, width, 3),
            nn.ReLU(inplace=True),
            *stages,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )
        self.num_classes = num_classes


class _Residual(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        same = channels == out and stride == 1
        self.shortcut = nn.Identity() if same else _convolution(channels, out, 1, stride)
        self.branch = nn.Sequential(
            _convolution(channels, out, 3, stride), nn.ReLU(inplace=True), _convolution(out, out, 3)
        )
        self.activation = nn.ReLU(inplace=True)

    def forward(self, images: Tensor) -> Tensor:
        result: Tensor = self.activation(self.shortcut(images) + self.branch(images))
        return result


def _convolution(channels: int, out: int, size: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels, out, size, stride, padding=size // 2, bias=False)
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(convolution, nn.BatchNorm2d(out))
