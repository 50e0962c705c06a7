"""A spring from the weights to an anchor: L2 and elastic weight consolidation."""

import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_merge import weights
from lightning_merge._checks import names, number, one_of, path, whole
from lightning_merge._whole_steps import hook_whole_steps, is_around
from lightning_merge.callbacks._importance_run._fisher import FisherPass
from lightning_merge.callbacks._lightning._on_one_process import on_one_process
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._strategies import refuse_sharding
from lightning_merge.callbacks._task_run._head_search import HeadSearch
from lightning_merge.continual import head_parameters
from lightning_merge.files import atomic
from lightning_merge.selections import Selection, chosen
from lightning_merge.weights import Weights

Importance = Literal["identity", "fisher"]
AnchorAt = Literal["base", "last"]

_KEY = "lightning_merge_anchor"

_PASS = FisherPass("Anchor", "`importance='fisher'`", "Choose `importance='identity'`.")


class Anchor(Callback):
    """Pulls after each optimizer step: ``w <- (w + c F a) / (1 + c F)``, ``c = lr * strength / (1 - momentum)``.

    That is the proximal (implicit) step of the penalty ``strength / 2 * sum_i F_i (w_i - a_i)^2``. To first order in
    ``lr`` it is what its gradient in the loss would do, and it comes to rest where the loss and the penalty together
    are least; but no strength makes it overshoot: the larger, the closer to ``a``. It passes neither through gradient
    clipping nor, like AdamW's decay, through the scaling of an adaptive optimizer.

    Use one object for all tasks of a stream, after ``ContinualMerging`` in the list. ``F`` is 1, or the empirical
    Fisher information: the mean over samples of squared gradients of their loss, at the end of each task, summed over
    the tasks so far (so the first task is free).

    Args:
        strength: At least 0, in units of the loss (with SGD; an adaptive optimizer scales the loss but not the pull).
        importance: ``"identity"`` or ``"fisher"``.
        at: Where ``a`` is: ``"base"``, the weights the first task started from, or ``"last"``, where the last task
            ended (the first task is then free).
        samples: Of the task's last batches for the Fisher information; at least 1. They are not kept.
        selection: Which parameters are held; by default all that are trainable.
        head: Globs of the head's parameters, which are never held; by default the layer that makes the logits.
        file: Where the anchor is kept between processes; by default only in this object and in full checkpoints. Needed
            where each fit has processes of its own (``ddp_spawn``, ``ddp_notebook``).

    Raises:
        ValueError: If an argument is out of range, or at fit start if the module is not that of the first task, or the
            strategy shards parameters; before the first step if one cannot tell the head, or, with ``"fisher"``, if
            ``training_step`` gives no loss of single samples.

    Example:
        >>> Anchor(strength=100.0, importance="fisher", at="last").samples
        256

    References:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks" (EWC), PNAS 2017, equation 3; sums
        of Fisher information as in Schwarz et al., "Progress and compress", ICML 2018.
    """

    def __init__(
        self,
        strength: float,
        importance: Importance = "identity",
        at: AnchorAt = "base",
        samples: int = 256,
        selection: Selection | None = None,
        head: str | list[str] | None = None,
        file: str | Path | None = None,
    ) -> None:
        self.strength = number("strength", strength, "[0, inf)", "at least 0 and finite")
        self.importance: Importance = one_of("importance", importance, Importance)
        self.at: AnchorAt = one_of("at", at, AnchorAt)
        self.samples = whole("samples", samples, 1)
        self.selection = chosen(selection, Selection(trainable=True))
        self.head = None if head is None else list(names("head", head))
        self.file = None if file is None else Path(path("file", file))
        self._anchor: Weights = {}
        self._fisher: Weights = {}
        self._recent: RecentBatches | None = None
        self._pulled: dict[torch.nn.Parameter, str] = {}
        self._hooks: list[RemovableHandle] = []
        self._followed: list[Optimizer] = []  # after whose steps it pulls
        self._search: HeadSearch | None = None  # until the head is known

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes the anchor from the file."""
        if stage != "fit":
            return
        refuse_sharding(trainer.strategy, "Anchor")
        if not self._anchor and self.file is not None and zipfile.is_zipfile(self.file):
            self._restore(torch.load(self.file, weights_only=True))
        self._recent = RecentBatches() if self.importance == "fisher" else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Looks the parameters up, now that the module is built, and pulls after each applied step from here on.

        That is before an average of the same run takes the weights in.
        """
        if self.head is None and not self._anchor:
            self._search = HeadSearch(None, title="Anchor", others="held")
        held = self._held(pl_module)
        if not self._anchor and self.at == "base":
            self._anchor = weights.clone(held)
        if self._anchor and (difference := weights.first_mismatch(self._anchor, held)):
            raise ValueError(f"the model is not the one that Anchor was started with: {difference}.")
        if self._recent is not None:
            _PASS.prepare(trainer, pl_module, self._held, self._recent)
        self._pulled = {parameter: name for name, parameter in held.items()}
        for optimizer in trainer.optimizers:
            self._follow(optimizer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Pulls after the steps of optimizers too that came in the place of others, or beside them, since the start."""
        if not any(is_around(optimizer, other) for other in self._followed):
            self._follow(optimizer)

    def _follow(self, optimizer: Optimizer) -> None:
        self._followed.append(optimizer)
        handles = hook_whole_steps(optimizer, None, self._pull)
        post_hooks = cast(OrderedDict[int, Any], optimizer._optimizer_step_post_hooks)
        post_hooks.move_to_end(handles[1].id, last=False)
        self._hooks += handles

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leaves the optimizers, also after an exception."""
        self._pulled, self._followed = {}, []
        while self._hooks:
            self._hooks.pop().remove()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Looks for the head with the first batch, tries the step on it, and copies each for the Fisher information."""
        if self._search is not None and not self._search.is_tried and self._search.attempt(trainer, pl_module, batch):
            self._settle(trainer, pl_module, self._search)
        if self._recent is not None:
            self._recent.try_now(batch)
            self._recent.hold(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Looks at the first loss where the step could not be tried."""
        if self._search is not None and loss.grad_fn is not None:
            self._search.look(pl_module, loss)
            self._settle(trainer, pl_module, self._search)

    def _settle(self, trainer: Trainer, module: LightningModule, search: HeadSearch) -> None:
        head = on_one_process(trainer, lambda: search.settled(module, "freeze", "", None)).names
        self._search = None
        self._anchor = {name: tensor for name, tensor in self._anchor.items() if name not in head}
        self._pulled = {parameter: name for parameter, name in self._pulled.items() if name not in head}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps it."""
        if self._recent is not None:
            self._recent.keep()

    @torch.no_grad()
    def _pull(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._anchor or (self.importance == "fisher" and not self._fisher):
            return
        for group in optimizer.param_groups:
            rate = group["lr"] * self.strength / (1 - group.get("momentum", 0.0))
            for parameter in group["params"]:
                name = self._pulled.get(parameter)
                if name is None or parameter.grad is None:
                    continue
                anchor = self._anchor[name].to(parameter.device)
                pull = rate * self._fisher[name].to(anchor) if self._fisher else torch.full_like(anchor, rate)
                share = 1 / (1 + 1 / pull)  # of the way, p / (1 + p); neither p = 0 nor p = inf makes a NaN
                parameter.copy_(torch.lerp(parameter.to(anchor), anchor, share))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Adds the task's Fisher information, and moves the anchor if it follows the last task."""
        if self._recent is not None:
            added = _PASS.measured(trainer, pl_module, self._held(pl_module), self._recent, self.samples)
            self._fisher = {name: self._fisher.get(name, 0) + tensor for name, tensor in added.means.items()}
            if added.means and not any(bool(each.any()) for each in added.means.values()):
                rank_zero_warn(
                    f"Anchor: all Fisher information of the {added.samples} samples is 0, so nothing of this task is"
                    " held. A loss that is 0 for a sample alone, as a contrastive one, has none."
                )
        if self.at == "last":
            self._anchor = weights.clone(self._held(pl_module))
        if self.file is not None and trainer.is_global_zero:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with atomic(self.file) as file:
                torch.save(self._saved(), file)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the anchor, so that a resumed task is held as before."""
        recent = [] if self._recent is None else self._recent.saved()
        checkpoint[_KEY] = {**self._saved(), "recent": recent}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes it back."""
        if _KEY in checkpoint and trainer.training:
            self._restore(checkpoint[_KEY])
            if self._recent is not None:
                self._recent = RecentBatches.restored(checkpoint[_KEY]["recent"])

    def _held(self, module: LightningModule) -> dict[str, torch.nn.Parameter]:
        """What is held; the head too, as long as it is not known."""
        chosen = self.selection.parameters(module)
        if self.head is None:
            if self._search is not None:
                return chosen
            known = self._anchor or self._pulled.values()
            return {name: p for name, p in chosen.items() if name in known}
        head = head_parameters(module, self.head, "head")
        return {name: p for name, p in chosen.items() if name not in head}

    def _saved(self) -> dict[str, Weights]:
        return {"anchor": self._anchor, "fisher": self._fisher}

    def _restore(self, saved: dict[str, Weights]) -> None:
        self._anchor, self._fisher = saved["anchor"], saved["fisher"]
