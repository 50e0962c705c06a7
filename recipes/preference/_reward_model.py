"""A reward model: which of two answers people would choose."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from lightning_merge.files._read import read
from lightning_merge.recipes.preference._dpo import PreferenceAccuracy
from lightning_merge.recipes.preference._language_model import LanguageModel
from lightning_merge.recipes.preference._tokens import IGNORED, Batch


class RewardModel(LanguageModel):
    """``-log sigmoid(reward of chosen - reward of rejected)``: a number for a dialogue, read at its last token.

    Logs ``val/loss`` and ``val/acc``, the share of held-out pairs whose chosen answer has the higher reward.

    Args:
        start: A checkpoint of ``preference/sft`` or ``preference/base``; ``None`` for a new model or a ``name``.
        name: See ``LanguageModel``.
        config: See ``LanguageModel``.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds the learning-rate schedule, of optimizer steps; ``None`` keeps the rate constant.

    References:
        Christiano et al., Deep reinforcement learning from human preferences, NeurIPS 2017, eq. 1.
    """

    def __init__(
        self,
        start: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__(name, config, start, optimizer, lr_scheduler)
        self.head = nn.Linear(int(self.model.config.hidden_size), 1, bias=False)  # type: ignore[union-attr, arg-type]
        nn.init.zeros_(self.head.weight)
        self.val_pair_accuracy = PreferenceAccuracy()

    def rewards(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """The reward of each row, at the last token that is a label; shape (rows,)."""
        hidden = self.model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states[-1]
        places = torch.arange(tokens.shape[1], device=tokens.device)
        last = places.where(labels != IGNORED, 0).amax(1)
        found: Tensor = self.head(hidden[torch.arange(len(tokens), device=tokens.device), last].float()).squeeze(1)
        return found

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = -logsigmoid(self._margins(batch)).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            return  # text
        margins = self._margins(batch)
        self.val_loss(-logsigmoid(margins))
        self.val_pair_accuracy(margins)
        self.log("val/loss", self.val_loss, add_dataloader_idx=False)
        self.log("val/acc", self.val_pair_accuracy, add_dataloader_idx=False, prog_bar=True)

    def _margins(self, batch: Batch) -> Tensor:
        rewards = self.rewards(batch["tokens"].flatten(0, 1), batch["labels"].flatten(0, 1)).view(-1, 2)
        return rewards[:, 0] - rewards[:, 1]


def read_module(path: str, argument: str) -> Mapping[str, Tensor]:
    """Reads the weights of a module that a recipe saved.

    Raises:
        ValueError: If the file holds none.
    """
    content = read(Path(path))
    if not isinstance(content, Mapping) or "head.weight" not in content.get("state_dict", {}):
        raise ValueError(f"`{argument}`: {path} holds no reward model. Give a checkpoint of preference/reward.")
    weights: Mapping[str, Tensor] = content["state_dict"]
    return weights
