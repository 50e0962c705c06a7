"""On-policy preference tuning: policy gradients with a leave-one-out baseline."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric

from lightning_merge.callbacks import teacher
from lightning_merge.recipes.preference._causal_lm import causal_lm
from lightning_merge.recipes.preference._dpo import PreferenceAccuracy
from lightning_merge.recipes.preference._language_model import (
    LanguageModel,
    answer_log_probabilities,
    load_start,
    next_token_loss,
)
from lightning_merge.recipes.preference._reward_model import RewardModel, read_module
from lightning_merge.recipes.preference._tokens import IGNORED, Batch


class RLOO(LanguageModel):
    """Samples ``samples`` answers to each prompt and raises the log-probability of those that score above the others.

    The advantage of an answer is its score less the mean score of the prompt's other answers; the score is the reward
    model's number less ``kl`` times the log ratio to the reference, which is ``start`` or an average of this run.
    Manual optimisation, one step a batch. Logs ``train/reward``, ``train/kl``, ``val/acc`` (share of sampled answers to
    held-out prompts that score above the pair's rejected answer), ``val/reward`` and ``val/lm_loss``.

    Args:
        start: A checkpoint of ``preference/sft``: where training starts, and the reference without an ``anchor``.
        reward: A checkpoint of ``preference/reward``.
        config: Configuration of all three models; see ``LanguageModel``.
        samples: Answers per prompt; at least 2.
        answer: Tokens of a sampled answer at most; at least 1.
        kl: Weight of the log ratio, at least 0; 0 with online merging, which holds the model otherwise.
        anchor: Name of the callback whose weights are the reference: ``"warp"`` for ``WARP``, which holds each branch
            by a moving average of its own; ``None`` for ``start``.
        clip: Norm that gradients are clipped to, above 0.
        optimizer: Builds the optimizer from the parameters.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Ahmadian et al., Back to Basics: revisiting REINFORCE style optimization for RLHF, 2024, eq. 7.
    """

    def __init__(
        self,
        start: str,
        reward: str,
        config: Mapping[str, Any] | None = None,
        samples: int = 4,
        answer: int = 48,
        kl: float = 0.05,
        anchor: str | None = None,
        clip: float = 1.0,
        optimizer: OptimizerCallable = torch.optim.AdamW,
    ) -> None:
        for argument, value, least in (("samples", samples, 2), ("answer", answer, 1), ("kl", kl, 0)):
            if value < least:
                raise ValueError(f"`{argument}` must be at least {least}, got {value}.")
        if clip <= 0:
            raise ValueError(f"`clip` must be above 0, got {clip}.")
        super().__init__(None, config, start, optimizer)
        self.automatic_optimization = False
        reference = causal_lm(None, config)
        load_start(reference, start)
        scorer = RewardModel(config=config)
        scorer.load_state_dict(read_module(reward, "reward"))
        # In a list, so that they are neither saved nor counted as part of the model.
        self._frozen: list[Any] = [frozen.eval().requires_grad_(False) for frozen in (reference, scorer)]
        self.samples = samples
        self.answer = answer
        self.kl = kl
        self.anchor = anchor
        self.clip = clip
        self.val_wins = PreferenceAccuracy()
        self.val_reward = MeanMetric()

    def on_fit_start(self) -> None:
        for frozen in self._frozen:
            frozen.to(self.device)

    on_validation_start = on_fit_start

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        tokens, labels = self.sample(batch, self.samples)
        reference = self._reference(tokens, labels)  # before the policy's pass, whose weights the anchor's replace
        policy = answer_log_probabilities(self(tokens), labels)
        with torch.no_grad():
            reward = self._frozen[1].rewards(tokens, labels)
            scores = (reward - self.kl * (policy - reference)).view(-1, self.samples)
            others = (scores.sum(1, keepdim=True) - scores) / (self.samples - 1)
            advantages = (scores - others).flatten()
        loss = -(advantages * policy).mean()
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        optimizer.step()
        self.log_dict({"train/reward": reward.mean(), "train/kl": (policy.detach() - reference).mean()})

    @torch.no_grad()
    def _reference(self, tokens: Tensor, labels: Tensor) -> Tensor:
        if self.anchor is None:
            return answer_log_probabilities(self._frozen[0](input_ids=tokens, use_cache=False).logits, labels)
        self.model.eval()  # as `start` is: no dropout
        try:
            with teacher(self, self.anchor):
                return answer_log_probabilities(self(tokens), labels)
        finally:
            self.model.train()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == 0:
            self.val_loss(next_token_loss(self(batch["tokens"]), batch["labels"]), len(batch["labels"]))
            self.log("val/lm_loss", self.val_loss, add_dataloader_idx=False)
            return
        reward = self._frozen[1].rewards(*self.sample(batch, 1))
        rejected = self._frozen[1].rewards(batch["tokens"][:, 1], batch["labels"][:, 1])
        self.val_wins(reward - rejected)
        self.val_reward(reward)
        self.log("val/acc", self.val_wins, add_dataloader_idx=False, prog_bar=True)
        self.log("val/reward", self.val_reward, add_dataloader_idx=False)

    @torch.no_grad()
    def sample(self, batch: Batch, count: int) -> tuple[Tensor, Tensor]:
        """``count`` answers to each pair's prompt, as tokens and labels; an answer ends with the end token."""
        end = int(self.model.config.eos_token_id)  # type: ignore[union-attr, arg-type]
        tokens, labels = batch["tokens"][:, 0], batch["labels"][:, 0]
        lengths = (labels != IGNORED).float().argmax(1)  # an answer begins where the first label is
        width = int(lengths.max())
        places = torch.arange(width, device=tokens.device)
        # Prompts end together, so that all answers begin at the same place.
        shifted = (places + lengths[:, None] - width).clamp_(min=0)
        rows = tokens.gather(1, shifted).repeat_interleave(count, 0)
        done = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        answers = torch.full_like(rows[:, :0], IGNORED)
        for _ in range(self.answer):
            drawn = torch.multinomial(self(rows)[:, -1].float().softmax(-1), 1)
            drawn = torch.where(done[:, None], end, drawn)
            answers = torch.cat([answers, torch.where(done[:, None], IGNORED, drawn)], 1)
            rows = torch.cat([rows, drawn], 1)
            done |= drawn[:, 0] == end
            if done.all():
                break
        return rows, torch.cat([torch.full_like(rows[:, :width], IGNORED), answers], 1)
