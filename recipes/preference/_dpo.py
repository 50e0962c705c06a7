"""Direct preference optimisation against a frozen reference, and its two metrics."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from torchmetrics import MeanMetric, Metric

from lightning_merge.recipes.preference._causal_lm import causal_lm
from lightning_merge.recipes.preference._language_model import (
    LanguageModel,
    answer_log_probabilities,
    load_start,
    next_token_loss,
)
from lightning_merge.recipes.preference._tokens import Batch


class PreferenceAccuracy(Metric):
    """Share of pairs whose reward margin is positive; a margin of 0 counts half.

    Example:
        >>> accuracy = PreferenceAccuracy()
        >>> accuracy.update(torch.tensor([0.5, -1.0, 0.0, 2.0]))
        >>> accuracy.compute()
        tensor(0.6250)
    """

    full_state_update = False
    right: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("right", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, margins: Tensor) -> None:
        self.right += (margins > 0).sum() + 0.5 * (margins == 0).sum()
        self.total += margins.numel()

    def compute(self) -> Tensor:
        return self.right / self.total


class RewardMargin(Metric):
    """Mean reward of chosen answers minus that of rejected ones.

    Example:
        >>> margin = RewardMargin()
        >>> margin.update(torch.tensor([0.5, 1.5]))
        >>> margin.compute()
        tensor(1.)
    """

    full_state_update = False
    sum: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sum", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("total", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, margins: Tensor) -> None:
        self.sum += margins.sum()
        self.total += margins.numel()

    def compute(self) -> Tensor:
        return self.sum / self.total


class DPO(LanguageModel):
    """``-log sigmoid(beta * (log ratio of chosen - log ratio of rejected))``, ratios to the frozen model ``start``.

    Logs ``val/acc`` (pairs whose chosen answer the model moved towards more), ``val/margin`` (in rewards, ``beta``
    times the log ratio), ``val/loss``, and ``val/lm_loss``: nats per token on held-out text, not to be forgotten.

    Args:
        start: A checkpoint of ``preference/sft``: the weights that training starts from, and the reference. May be left
            out for a ``name``.
        name: See ``LanguageModel``.
        config: See ``LanguageModel``.
        beta: How strongly the reference holds, above 0; large values hold.
        optimizer: Builds the optimizer from the parameters.
        lr_scheduler: Builds the learning-rate schedule, of optimizer steps; ``None`` keeps the rate constant.

    Raises:
        ValueError: If ``beta`` is not above 0, or there is neither ``start`` nor ``name``.

    References:
        Rafailov et al., Direct Preference Optimization, NeurIPS 2023, eq. 7.
    """

    def __init__(
        self,
        start: str | None = None,
        name: str | None = None,
        config: Mapping[str, Any] | None = None,
        beta: float = 0.1,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        if beta <= 0:
            raise ValueError(f"`beta` must be above 0, got {beta}.")
        if start is None and name is None:
            raise ValueError("`start` must be a checkpoint of preference/sft: --model.start FILE; or give a `name`.")
        super().__init__(name, config, start, optimizer, lr_scheduler)
        reference = causal_lm(name, config)
        if start is not None:
            load_start(reference, start)
        # In a list, so that it is neither saved nor counted as part of the model.
        self._frozen: list[nn.Module] = [reference.eval().requires_grad_(False)]
        self._known: dict[tuple[str, int], Tensor] = {}  # its log-probabilities of pairs, which never change
        self.beta = beta
        self.val_pair_loss = MeanMetric()
        self.val_pair_accuracy = PreferenceAccuracy()
        self.val_margin = RewardMargin()

    def on_fit_start(self) -> None:
        self._frozen[0].to(self.device)

    def on_validation_start(self) -> None:
        self._frozen[0].to(self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = -logsigmoid(self.beta * self._margins(batch, "train")).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            self.val_loss(next_token_loss(self(batch["tokens"]), batch["labels"]), len(batch["labels"]))
            self.log("val/lm_loss", self.val_loss, add_dataloader_idx=False)
            return
        margins = self.beta * self._margins(batch, "val")
        self.val_pair_loss(-logsigmoid(margins))
        self.val_pair_accuracy(margins)
        self.val_margin(margins)
        self.log("val/loss", self.val_pair_loss, add_dataloader_idx=False)
        self.log("val/acc", self.val_pair_accuracy, add_dataloader_idx=False, prog_bar=True)
        self.log("val/margin", self.val_margin, add_dataloader_idx=False)

    def _margins(self, batch: Batch, part: str) -> Tensor:
        tokens, labels = batch["tokens"].flatten(0, 1), batch["labels"].flatten(0, 1)
        policy = answer_log_probabilities(self(tokens), labels).view(-1, 2)
        ratios = policy - self._reference(batch, tokens, labels, part)
        return ratios[:, 0] - ratios[:, 1]

    @torch.no_grad()
    def _reference(self, batch: Batch, tokens: Tensor, labels: Tensor, part: str) -> Tensor:
        """The frozen model's log-probabilities of the pairs, each computed once."""
        places = [(part, index) for index in batch["index"].tolist()]
        if not all(place in self._known for place in places):
            logits: Tensor = self._frozen[0](input_ids=tokens, use_cache=False).logits
            found = answer_log_probabilities(logits, labels).view(-1, 2)
            self._known |= dict(zip(places, found.cpu().unbind(), strict=True))
        return torch.stack([self._known[place] for place in places]).to(tokens.device)
