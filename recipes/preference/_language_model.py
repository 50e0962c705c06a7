"""Language modelling by next-token prediction, and the helpers it shares with preference tuning."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from lightning_merge.files._read import read
from lightning_merge.recipes.preference._causal_lm import causal_lm
from lightning_merge.recipes.preference._tokens import IGNORED, Batch


class LanguageModel(LightningModule):
    """Next-token training of a causal language model; logs ``train/loss``, ``val/loss`` and ``val/acc`` per token.

    Args:
        name: A model of Hugging Face transformers, by its name or folder, for example ``"gpt2"``.
        config: Configuration of a new model, with a ``model_type``, if there is no ``name``. By default a small GPT-2
            over bytes.
        start: A checkpoint of a module of these recipes whose weights this one starts from.
        optimizer: Builds the optimizer from the named parameters.
        lr_scheduler: Builds the learning-rate schedule, of optimizer steps; ``None`` keeps the rate constant.

    Raises:
        ImportError: If transformers is not installed.
        ValueError: If ``start`` is not the checkpoint of such a model.
    """

    def __init__(
        self,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        start: str | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.model = causal_lm(name, config)
        if start is not None:
            load_start(self.model, start)
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.val_loss = MeanMetric()
        self.val_accuracy = MulticlassAccuracy(_vocabulary(self.model), average="micro", ignore_index=IGNORED)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, of shape (rows, tokens, vocabulary)."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor | None:
        loss = next_token_loss(self(batch["tokens"]), batch["labels"])
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx > 0:
            return  # pairs, which say nothing about next tokens
        logits, labels = self(batch["tokens"]), batch["labels"]
        self.val_loss(next_token_loss(logits, labels), len(labels))
        self.val_accuracy(logits[:, :-1].argmax(-1), labels[:, 1:])
        self.log("val/loss", self.val_loss, add_dataloader_idx=False)
        self.log("val/acc", self.val_accuracy, add_dataloader_idx=False, prog_bar=True)

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameters())
        if self.lr_scheduler is None:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}}


def load_start(model: nn.Module, path: str) -> None:
    """Loads the weights that a module of these recipes saved under ``model.``.

    Raises:
        ValueError: If the file holds none for this model.
    """
    content = read(Path(path))
    saved = content.get("state_dict", {}) if isinstance(content, Mapping) else {}
    weights = {key.removeprefix("model."): value for key, value in saved.items() if key.startswith("model.")}
    missing = [key for key in model.state_dict() if key not in weights]
    if missing:
        raise ValueError(
            f"`start`: {path} lacks `model.{missing[0]}`. Give the checkpoint of the recipe before this one, trained"
            " with the same `name` or `config`."
        )
    model.load_state_dict(weights)


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of each label given the tokens before it."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED)


def answer_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """The sum of the log-probabilities of each row's labels; shape (rows,)."""
    targets = labels[:, 1:]
    losses = cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return -losses.view_as(targets).sum(1)


def _vocabulary(model: nn.Module) -> int:
    return int(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
