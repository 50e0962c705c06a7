"""ImageNet, from folders of photographs of any size."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from lightning_merge._checks import path, text, whole
from lightning_merge.recipes.vision._classifier import Classifier
from lightning_merge.recipes.vision._image_folders import open_folders
from lightning_merge.recipes.vision._loading import Batch, check_head, checked_loader, loader
from lightning_merge.recipes.vision._pretrained import scaling


class ImageNet(LightningDataModule):
    """Photographs in ``train/<class>/`` and ``val/<class>/``, of any size, as ImageNet has them. No download.

    timm augments the training images (a crop of 8 to 100 % of the area, mirrored, other colours) and crops the middle
    of the validation images, 87.5 % of the shorter side. Colours are scaled by ImageNet's, or, if a ``Classifier`` has
    ``pretrained`` weights, as timm says of its model. ``test`` measures the validation images too: the labels of
    ImageNet's test images are not public.

    Args:
        root: The folder with ``train/`` and ``val/``.
        batch_size: Images per batch and process; at least 1. The rest of an epoch's images is dropped in training.
        num_workers: Processes that decode images; at least 0. A GPU needs 8 or more.
        image_size: Pixels each way that the model sees; at least 1.
        auto_augment: A policy of timm such as ``"rand-m7-mstd0.5"`` instead of random colours.

    Raises:
        ValueError: If an argument is out of range; in ``setup`` if folders are not as described or fit not the model.
        FileNotFoundError: In ``setup`` if there are no images.
    """

    def __init__(
        self,
        root: str = "data/imagenet",
        batch_size: int = 256,
        num_workers: int = 8,
        image_size: int = 224,
        auto_augment: str | None = None,
    ) -> None:
        super().__init__()
        batch_size, num_workers = checked_loader(batch_size, num_workers)
        image_size = whole("image_size", image_size, 1, 100_000)
        if auto_augment is not None:
            text("auto_augment", auto_augment)
        self.root = Path(path("root", root)).expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.image_size = image_size
        self.auto_augment = auto_augment

    def setup(self, stage: str) -> None:
        from timm.data.transforms_factory import create_transform

        if not self.root.exists():
            raise FileNotFoundError(
                f"no ImageNet in {self.root}. Put train/<class>/ and val/<class>/ of images there, or say where they"
                " are with `--data.root`.\nThe digits/... recipes need no files."
            )
        self.train, self.val = open_folders(self.root, "train", "val")
        check_head(self.trainer, len(self.train.classes), self.root)
        if stage == "fit" and len(self.train) < self.batch_size:
            raise ValueError(
                f"`batch_size` must be at most the {len(self.train)} training images, got {self.batch_size}."
            )
        how: dict[str, Any] = {"interpolation": "bicubic"}
        module = self.trainer.lightning_module if self.trainer is not None else None
        if isinstance(module, Classifier) and module.pretrained is not None:
            how |= scaling(module.model)
        self.train.transform = create_transform(
            self.image_size, is_training=True, auto_augment=self.auto_augment, **how
        )
        self.val.transform = create_transform(self.image_size, crop_pct=0.875, **how)

    def train_dataloader(self) -> DataLoader[Batch]:
        return loader(self.train, self.batch_size, self.num_workers, training=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return loader(self.val, self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()
