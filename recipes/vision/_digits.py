"""Real handwritten digits that ship with scikit-learn, and a small network for them."""

import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_merge._checks import LISTED, real, whole


class Digits(LightningDataModule):
    """1,797 images of digits, 8x8 grey values in [0, 1], from 43 writers (Alpaydin and Kaynak, 1998). No download.

    The split keeps the share of each digit. It ignores who wrote what (the file does not say), so scores are higher
    than on new writers.

    Args:
        batch_size: Images per batch; at least 1. What is left of an epoch's images after whole batches is dropped.
        val_share: Share of the images held out for validation, in (0, 1).
        test_share: Share held out for the test, in (0, 1); some must be left for training.
        shift: Training images are moved by up to so many pixels each way at random; at least 0.
        split_seed: Chooses the split, and nothing else.

    Raises:
        ValueError: If an argument is out of range, or in ``setup`` if there are fewer training images than in a batch.
    """

    def __init__(
        self,
        batch_size: int = 32,
        val_share: float = 0.25,
        test_share: float = 0.25,
        shift: int = 1,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size = whole("batch_size", batch_size, 1)
        self.val_share, self.test_share = real("val_share", val_share), real("test_share", test_share)
        if not (val_share > 0 and test_share > 0 and val_share + test_share < 1):
            raise ValueError(
                "`val_share` and `test_share` must be more than 0 and together less than 1,"
                f" got {val_share} and {test_share}."
            )
        self.shift = whole("shift", shift, 0, 1000)
        self.split_seed = whole("split_seed", split_seed, 0, 2**32 - 1)

    def setup(self, stage: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        digits = load_digits()
        images = torch.from_numpy(digits.images).float().div(16).unsqueeze(1)
        labels = torch.from_numpy(digits.target).long()
        held_out = self.val_share + self.test_share
        train, rest = train_test_split(
            range(len(labels)), test_size=held_out, random_state=self.split_seed, stratify=labels
        )
        val, test = train_test_split(
            rest, test_size=self.test_share / held_out, random_state=self.split_seed, stratify=labels[rest]
        )
        if self.batch_size > len(train):
            raise ValueError(f"`batch_size` must be at most the {len(train)} training images, got {self.batch_size}.")
        self.train = _Shifted(images[train], labels[train], self.shift)
        self.val = TensorDataset(images[val], labels[val])
        self.test = TensorDataset(images[test], labels[test])

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.train, self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.val, batch_size=256)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.test, batch_size=256)

    def predict_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        return self.test_dataloader()


class SmallConvNet(nn.Sequential):
    """Three 3x3 convolutions with BatchNorm, a mean over the image, a linear layer.

    Args:
        channels: Input channels.
        num_classes: Logits per image.
        width: Channels of the first convolution; the others have twice and four times as many.

    Example:
        >>> SmallConvNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self, channels: int = 1, num_classes: int = 10, width: int = 16) -> None:
        channels, width = whole("channels", channels, 1, 10_000), whole("width", width, 1, 10_000)
        num_classes = whole("num_classes", num_classes, 1, LISTED)
        super().__init__(
            _block(channels, width),
            _block(width, 2 * width),
            nn.MaxPool2d(2),
            _block(2 * width, 4 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4 * width, num_classes),
        )


def _block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU())


class _Shifted(Dataset[tuple[Tensor, ...]]):
    """Images shifted by up to ``shift`` pixels each way, at random at each read, and padded with black."""

    def __init__(self, images: Tensor, labels: Tensor, shift: int) -> None:
        self.images = pad(images, (shift,) * 4)
        self.labels = labels
        self.size = images.shape[-1]
        self.offsets = 2 * shift + 1

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        top, left = torch.randint(self.offsets, (2,)).tolist()
        return self.images[index, :, top : top + self.size, left : left + self.size], self.labels[index]
