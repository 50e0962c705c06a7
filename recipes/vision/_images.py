"""CIFAR and ImageNet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import LightningDataModule, Trainer
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from lightning_merge._checks import one_of, path, text, whole
from lightning_merge._checks import seed as checked_seed
from lightning_merge.recipes.vision._classifier import Classifier
from lightning_merge.recipes.vision._image_folders import check_unpacked, open_folders

Batch = tuple[Tensor, Tensor]

_SOURCES = {"cifar10": CIFAR10, "cifar100": CIFAR100}
# Mean and standard deviation of red, green and blue over the training images.
COLOURS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


class CIFAR(LightningDataModule):
    """60,000 colour photographs, 32x32, of 10 or 100 classes (Krizhevsky, 2009), kept in memory.

    Training images are moved by up to 4 pixels each way and mirrored, at random. Validation measures images held out
    of the training images; the test images are for ``test``.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: Folder with ``train/<class>/`` and ``test/<class>/``, or with torchvision's files. If it is empty or
            absent, they are downloaded into it (170 MB). Default ``data/<name>``.
        batch_size: Images per batch; at least 1. What is left of an epoch's images after whole batches is dropped.
        num_workers: Processes that prepare batches; at least 0. A batch takes a few milliseconds.
        train_images: Trains on so many images, equally many of each class; at least ``batch_size``. ``None`` for all.
        val_images: Images held out, equally many of each class; at least 0. With 0, validation measures the test
            images, as in most papers: only for runs that choose nothing by it.
        seed: Chooses which images are held out and trained on, and nothing else.

    Raises:
        ValueError: If an argument is out of range; in ``setup`` if the images fit neither it nor the model.
        FileNotFoundError: In ``prepare_data`` or ``setup`` if there are no images.
    """

    def __init__(
        self,
        name: Literal["cifar10", "cifar100"] = "cifar10",
        root: str | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        train_images: int | None = None,
        val_images: int = 5000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        one_of("name", name, tuple(_SOURCES), f"one of {', '.join(map(repr, _SOURCES))}")
        batch_size, num_workers = _checked_loader(batch_size, num_workers)
        root = None if root is None else path("root", root)
        val_images, seed = whole("val_images", val_images, 0), checked_seed("seed", seed)
        train_images = None if train_images is None else whole("train_images", train_images)
        if train_images is not None and train_images < batch_size:
            raise ValueError(f"`train_images` must be at least `batch_size` ({batch_size}), got {train_images}.")
        self.kind = name  # `name` is Lightning's
        self.source = _SOURCES[name]
        self.root = Path(root or f"data/{name}").expanduser()
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.train_images = train_images
        self.val_images = val_images
        self.seed = seed

    def prepare_data(self) -> None:
        """Downloads the images if there are none."""
        source = self.source
        if self._is_sorted():
            return
        found = sorted(entry.name for entry in self.root.glob("[!.]*"))
        if self.root.is_file() or (found and not {source.base_folder, source.filename} & set(found)):
            check_unpacked(self.root)
            raise ValueError(
                f"`data.root` {self.root} holds neither folders of images, train/ and test/, nor {source.base_folder}/,"
                f" but {', '.join(found[:3])}{', ...' if len(found) > 3 else ''}.\nName the folder that does, or an"
                " empty or new one to download into."
            )
        try:
            source(str(self.root), download=True)
        except (OSError, RuntimeError) as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise FileNotFoundError(
                f"no {self.kind} in {self.root}, and the download failed ({reason}). Put {source.filename} or folders"
                " train/<class>/ and test/<class>/\nof images there, or say where they are with `--data.root`. The"
                " digits/... recipes need no files."
            ) from error

    def setup(self, stage: str) -> None:
        train, test = self._open()
        _check_head(self.trainer, len(train.classes), self.root)
        if stage in ("fit", "validate"):
            order = in_turn(torch.tensor(train.targets), self.seed)
            self._check_split(len(order))
            held_out, rest = order[: self.val_images], order[self.val_images :]
            if stage == "fit":
                self.train = self._read(train, rest[: self.train_images], padding=4)
            self.val = self._read(train, held_out) if self.val_images else self._read(test)
        if stage in ("test", "predict"):
            self.test = self._read(test)

    def train_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.train, self.batch_size, self.num_workers, collate_fn=_as_it_is, training=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.val, 500, 0, collate_fn=_as_it_is)

    def test_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.test, 500, 0, collate_fn=_as_it_is)

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.test_dataloader()

    def _is_sorted(self) -> bool:
        return (self.root / "train").is_dir() or (self.root / "test").is_dir()

    def _open(self) -> tuple[Any, Any]:
        """Training and test images, both with ``targets`` and ``classes``."""
        if self._is_sorted():
            return open_folders(self.root, "train", "test")
        return self.source(str(self.root), train=True), self.source(str(self.root), train=False)

    def _check_split(self, images: int) -> None:
        if images - self.val_images < self.batch_size:
            raise ValueError(
                f"`val_images` {self.val_images} leaves {max(images - self.val_images, 0)} of {images} images to train"
                f" on, less than a batch of {self.batch_size}: lower `--data.val_images` or `--data.batch_size`."
            )
        if self.train_images is not None and self.train_images > images - self.val_images:
            raise ValueError(
                f"`train_images` must be at most {images - self.val_images}, the {images} images less the"
                f" {self.val_images} of validation, got {self.train_images}."
            )

    def _read(self, source: CIFAR10 | ImageFolder, chosen: Tensor | None = None, padding: int = 0) -> "_Images":
        indices = torch.arange(len(source.targets)) if chosen is None else chosen
        if isinstance(source, ImageFolder):
            files = [source.samples[index][0] for index in indices.tolist()]
            bar = track(files, "Reading images", transient=True, disable=not Console().is_terminal)
            pixels = torch.stack([_decoded(file) for file in bar])
        else:
            pixels = torch.from_numpy(source.data[indices.numpy()]).permute(0, 3, 1, 2).contiguous()
        return _Images(pixels, torch.tensor(source.targets)[indices], *COLOURS[self.kind], padding)


class ImageNet(LightningDataModule):
    """Photographs in ``train/<class>/`` and ``val/<class>/``, of any size, as ImageNet has them. No download.

    timm augments the training images (a crop of 8 to 100 % of the area, mirrored, other colours) and crops the middle
    of the validation images, 87.5 % of the shorter side. ``test`` measures the validation images too: the labels of
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
        batch_size, num_workers = _checked_loader(batch_size, num_workers)
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
        _check_head(self.trainer, len(self.train.classes), self.root)
        if stage == "fit" and len(self.train) < self.batch_size:
            raise ValueError(
                f"`batch_size` must be at most the {len(self.train)} training images, got {self.batch_size}."
            )
        self.train.transform = create_transform(
            self.image_size, is_training=True, interpolation="bicubic", auto_augment=self.auto_augment
        )
        self.val.transform = create_transform(self.image_size, interpolation="bicubic", crop_pct=0.875)

    def train_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.train, self.batch_size, self.num_workers, training=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return _loader(self.val, self.batch_size, self.num_workers)

    def test_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self.val_dataloader()


def in_turn(labels: Tensor, seed: int) -> Tensor:
    """Indices in a seeded order that takes one image of every class before a second of any.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 1, 1, 1])
        >>> labels[in_turn(labels, seed=0)].view(3, 2).sum(1)
        tensor([1, 1, 1])
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = labels[order].argsort(stable=True)
    counts = labels.bincount()
    turn = torch.empty_like(order)
    turn[by_class] = torch.arange(len(order)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    return order[turn.argsort(stable=True)]


class _Images(Dataset[Batch]):
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


def _decoded(file: str) -> Tensor:
    try:
        with Image.open(file) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise ValueError(f"{file} is not an image that can be read ({type(error).__name__}). Remove it.") from error
    if pixels.shape[:2] != (32, 32):
        raise ValueError(f"images must be 32x32, {file} is {pixels.shape[1]}x{pixels.shape[0]}.")
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _loader(
    dataset: Any, batch_size: int, num_workers: int, collate_fn: Any = None, training: bool = False
) -> DataLoader[Batch]:
    return DataLoader(
        dataset,
        batch_size,
        shuffle=training,
        drop_last=training,
        num_workers=num_workers,
        collate_fn=collate_fn,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=num_workers > 0,
    )


def _checked_loader(batch_size: int, num_workers: int) -> tuple[int, int]:
    return whole("batch_size", batch_size, 1), whole("num_workers", num_workers, 0, 10_000)


def _check_head(trainer: Trainer | None, classes: int, root: Path) -> None:
    """Raises if a model or its metrics have another number of classes; modules of others are not checked."""
    module = trainer.lightning_module if trainer is not None else None
    if not isinstance(module, Classifier):
        return
    for option, found in (
        ("model.num_classes", module.val_accuracy.num_classes),
        ("model.model.num_classes", getattr(module.model, "num_classes", classes)),
    ):
        if found != classes:
            raise ValueError(
                f"`{option}` is {found}, but {root} has {classes} classes. In the recipes `--model.num_classes"
                f" {classes}` sets the head and the metrics."
            )
