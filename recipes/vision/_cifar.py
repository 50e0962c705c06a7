"""CIFAR-10 and CIFAR-100, kept in memory."""

from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

from lightning_merge._checks import one_of, path, whole
from lightning_merge._checks import seed as checked_seed
from lightning_merge.recipes.vision._image_folders import check_unpacked, open_folders
from lightning_merge.recipes.vision._loading import Batch, check_head, checked_loader, loader
from lightning_merge.recipes.vision._pixels import COLOURS, Images, decoded, whole_batches

_SOURCES = {"cifar10": CIFAR10, "cifar100": CIFAR100}


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
        batch_size, num_workers = checked_loader(batch_size, num_workers)
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
        check_head(self.trainer, len(train.classes), self.root)
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
        return loader(self.train, self.batch_size, self.num_workers, collate_fn=whole_batches, training=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return loader(self.val, 500, 0, collate_fn=whole_batches)

    def test_dataloader(self) -> DataLoader[Batch]:
        return loader(self.test, 500, 0, collate_fn=whole_batches)

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

    def _read(self, source: CIFAR10 | ImageFolder, chosen: Tensor | None = None, padding: int = 0) -> Images:
        indices = torch.arange(len(source.targets)) if chosen is None else chosen
        if isinstance(source, ImageFolder):
            files = [source.samples[index][0] for index in indices.tolist()]
            bar = track(files, "Reading images", transient=True, disable=not Console().is_terminal)
            pixels = torch.stack([decoded(file) for file in bar])
        else:
            pixels = torch.from_numpy(source.data[indices.numpy()]).permute(0, 3, 1, 2).contiguous()
        return Images(pixels, torch.tensor(source.targets)[indices], *COLOURS[self.kind], padding)


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
