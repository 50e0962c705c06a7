"""Folders of random images, and the options with which a recipe runs two steps on them."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = 3

_ONE_IS_ENOUGH = {
    "anneal": ["--trainer.callbacks.window=1 steps", "--trainer.callbacks.every_n_steps=1"],
    "lawa": ["--trainer.callbacks.k=1"],
    "swad": ["--trainer.callbacks.n_converge=1"],
    # Two snapshots and a step of their coefficients take three steps, and images for them.
    "twa": [
        "--trainer.limit_train_batches=3",
        *(f"--trainer.callbacks.{k}=1" for k in ("every", "stage")),
        "--trainer.callbacks.start=0",
    ],
    "forkmerge": ["--trainer.callbacks.every_n_steps=2"],
    "diloco": ["--trainer.callbacks.every_n_steps=1"],
}
_CIFAR = ["--data.batch_size=4", f"--data.val_images={CLASSES}", f"--model.num_classes={CLASSES}"]
_IMAGENET = [
    "--data.batch_size=4",
    "--data.num_workers=0",
    "--data.image_size=32",
    f"--model.num_classes={CLASSES}",
    "--model.model.model_name=test_resnet",
    "--trainer.precision=32-true",
]


def write_images(root: Path, size: int = 32, **parts: int) -> Path:
    """Fills ``root/<part>/<class>/`` with so many images of each class."""
    values = np.random.default_rng(0)
    for part, images in parts.items():
        for label in range(CLASSES):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True, exist_ok=True)
            for index in range(images):
                pixels = values.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def tiny_options(name: str, folder: Path) -> list[str]:
    """Options that let a recipe run and merge in two steps, on images written below ``folder`` if it needs any."""
    dataset, _, method = name.partition("/")
    options = [*_ONE_IS_ENOUGH.get(method, []), "--trainer.accelerator=cpu"]
    if dataset in ("cifar10", "cifar100"):
        options += [f"--data.root={write_images(folder / 'images', train=6, test=1)}", *_CIFAR]
    if dataset == "imagenet":
        options += [f"--data.root={write_images(folder / 'images', size=40, train=6, val=2)}", *_IMAGENET]
    return options
