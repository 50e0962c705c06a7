"""A classifier with two more tasks, one that may help and one that cannot."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lightning_merge.recipes.vision._classifier import Classifier


class AuxiliaryClassifier(Classifier):
    """A ``Classifier`` whose ``training_step`` returns the losses of three tasks on one trunk, for ``ForkMerge``.

    ``target`` is the classification; ``rotation`` is which quarter turn an image was given, a task that may help;
    ``noise`` is the labels of other images of the batch, a task that cannot. The heads of the last two, ``rotation``
    and ``noise``, work on what the model's last linear layer sees.

    Its arguments are those of ``Classifier``: the model has a linear layer, the last one is its head, and images are
    square; ``label_smoothing`` is of the target.

    Raises:
        ValueError: If an argument is out of range, or the model has no linear layer.

    Example:
        >>> from torch import nn
        >>> module = AuxiliaryClassifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), num_classes=10)
        >>> module.rotation
        Linear(in_features=64, out_features=4, bias=True)

    References:
        Gidaris, Singh and Komodakis, "Unsupervised representation learning by predicting image rotations", ICLR 2018.
    """

    def add_heads(self, model: nn.Module, num_classes: int) -> None:
        """The heads of the two other tasks, which see what the model's own sees."""
        heads = [module for module in model.modules() if isinstance(module, nn.Linear)]
        if not heads:
            raise ValueError(f"`model` must have a linear layer, its head, and {type(model).__name__} has none.")
        head = heads[-1]
        self.rotation = nn.Linear(head.in_features, 4)
        self.noise = nn.Linear(head.in_features, num_classes)
        self._seen: Tensor | None = None
        head.register_forward_pre_hook(self._see)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        images, labels = batch
        return {
            "losses": {
                "target": lambda: self._target(images, labels),
                "rotation": lambda: self._turned(images),
                "noise": lambda: self._noisy(images, labels),
            }
        }

    def score_step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        images, labels = batch
        return (self(images).argmax(dim=1) == labels).sum(), len(labels)

    def _target(self, images: Tensor, labels: Tensor) -> Tensor:
        loss = cross_entropy(self(images), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def _turned(self, images: Tensor) -> Tensor:
        quarters = [images[turn::4].rot90(turn, (2, 3)) for turn in range(4)]
        turns = [torch.full((len(quarter),), turn, device=images.device) for turn, quarter in enumerate(quarters)]
        return cross_entropy(self.rotation(self._features(torch.cat(quarters))), torch.cat(turns))

    def _noisy(self, images: Tensor, labels: Tensor) -> Tensor:
        others = labels[torch.randperm(len(labels), device=labels.device)]
        return cross_entropy(self.noise(self._features(images)), others)

    def _features(self, images: Tensor) -> Tensor:
        self(images)
        seen, self._seen = self._seen, None
        assert seen is not None
        return seen

    def _see(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._seen = inputs[0]
