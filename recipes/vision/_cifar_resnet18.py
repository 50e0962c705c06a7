"""ResNet-18 for 32x32 images."""

from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from lightning_merge._checks import LISTED, whole


class CifarResNet18(ResNet):  # type: ignore[misc]  # torchvision has no types
    """ResNet-18 with a stem for small images: a 3x3 convolution of stride 1, and no pooling behind it.

    11.2 million parameters; what most reports on CIFAR train. It is for a GPU: a step takes some 45 times the
    multiplications of ``SmallResNet``. ``--model.model lightning_merge.recipes.CifarResNet18`` puts it into a recipe.

    Args:
        num_classes: Logits per image; at least 2.

    Raises:
        ValueError: If ``num_classes`` is out of range.

    Example:
        >>> import torch
        >>> CifarResNet18()(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    References:
        He et al., "Deep residual learning for image recognition", CVPR 2016.
    """

    def __init__(self, num_classes: int = 10) -> None:
        num_classes = whole("num_classes", num_classes, 2, LISTED)
        super().__init__(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
        self.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.maxpool = nn.Identity()
        self.num_classes = num_classes
