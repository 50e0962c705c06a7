"""The turns that branches take at the batches of a fit."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from lightning_merge.branches import Branches, OnePerRank
from lightning_merge.callbacks._branch_run._progress import Progress
from lightning_merge.callbacks._branch_run._settings import Augmentation as Augmentation
from lightning_merge.callbacks._branch_run._settings import Settings
from lightning_merge.callbacks._lightning._internals import accumulates
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches


@final
class Turns:
    """Stands around Lightning's training step and takes each batch through the branches that it is for.

    Args:
        settings: Say which batches are whose, and how they are augmented.
        steps: Counts the applied optimizer steps so far.
        trainer: The Trainer of the fit.
        branches: The branches; if this process holds one only, that one has every turn.
        progress: Where turns and groups are counted.
        recent: Where batches are kept, if they are.
        group_over: Called when every branch has had its turn.
    """

    def __init__(
        self,
        settings: Settings,
        steps: Callable[[], int],
        trainer: Any,
        branches: Branches,
        progress: Progress,
        recent: RecentBatches | None,
        group_over: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._steps = steps
        self._trainer = trainer
        self._branches = branches
        self._progress = progress
        self._recent = recent
        self._group_over = group_over
        self._apart = isinstance(branches, OnePerRank)  # the others train in other processes
        self._everyone = settings.batches == "same" and not self._apart
        self._gradients: dict[tuple[int, Tensor], Tensor | None] = {}  # that branches are accumulating

    def wrap(self, patches: Patches) -> None:
        """Takes the place of the training step until the fit ends."""
        loop = self._trainer.fit_loop.epoch_loop
        patches.replace(loop.automatic_optimization, "run", self._automatic)
        patches.replace(loop.manual_optimization, "run", self._manual)
        if self._settings.batches == "turns" and self._settings.schedulers == "group":
            patches.replace(self._trainer.lightning_module, "lr_scheduler_step", self._step_scheduler)

    def _automatic(self, original: Callable[..., Any], optimizer: Any, batch_idx: int, kwargs: dict[str, Any]) -> Any:
        trainer = self._trainer
        ends = not accumulates(trainer)
        progress = trainer.fit_loop.epoch_loop.automatic_optimization.optim_progress.optimizer.step
        keep = trainer.accumulate_grad_batches > 1
        output = self._train(lambda own: original(optimizer, batch_idx, own), kwargs, progress, lambda: ends, keep)
        if ends:
            self._gradients = {}  # Lightning sets them to zero before the next
        return output

    def _manual(self, original: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        progress = self._trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        steps, calls = self._steps(), progress.total.completed

        def ends() -> bool:
            # The module accumulates gradients as it likes: a turn is over when the optimizer has stepped. Processes
            # have to agree on that also if a gradient scaler has skipped the step of one.
            return self._steps() > steps or (self._apart and bool(progress.total.completed > calls))

        return self._train(original, kwargs, progress, ends, keep_gradients=True)

    def _train(
        self,
        original: Callable[[dict[str, Any]], Any],
        kwargs: dict[str, Any],
        progress: Any,
        ends: Callable[[], bool],
        keep_gradients: bool,
    ) -> Any:
        """Takes a batch through the branches that it is for.

        Args:
            original: Lightning's training step, optimizer step included.
            kwargs: Its arguments, the batch first.
            progress: Lightning's count of optimizer steps. The branches of a group count as one.
            ends: Whether the optimizer has stepped, so that the turn is over.
            keep_gradients: Whether gradients are accumulated, so that each branch needs its own.
        """
        ours, branches = self._progress, self._branches
        counted = progress.state_dict()
        output = None
        for branch in self._turns():
            if self._everyone:
                progress.load_state_dict(counted)
            branches.activate(branch)
            with self._own_gradients(branch, self._everyone and keep_gradients):
                before = self._steps()
                output = original(self._own_batch(branch, kwargs))
                branches.steps[branch] += self._steps() - before
            if self._recent is not None:
                self._recent.keep()
            if self._everyone or ends():
                ours.turn = branches.count if self._apart else branch + 1
            if ends():
                ours.trained += 1
        if ours.turn == branches.count:
            ours.turn = 0
            if ends():
                ours.groups += 1
                self._group_over()
        return output

    def _turns(self) -> Sequence[int]:
        """The branches that the next batch is for."""
        if self._everyone:
            return range(self._progress.turn, self._branches.count)
        return [self._branches.active if self._apart else self._progress.turn]

    def _own_batch(self, branch: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the training step with the batch as this branch sees it."""
        if "batch" not in kwargs:
            raise TypeError(
                f"{self._settings.title} hands a batch to each branch, so `training_step` must take a batch, not"
                " `dataloader_iter`."
            )
        batch = kwargs["batch"]
        if self._everyone and branch < self._branches.count - 1:
            batch = apply_to_collection(batch, Tensor, torch.clone)  # a step may write to its batch
        if self._settings.augmentations is not None:
            with torch.no_grad():
                batch = self._settings.augmentations[branch](batch)
        if self._recent is not None:
            self._recent.hold(batch)
        return OrderedDict(kwargs, batch=batch)

    @contextmanager
    def _own_gradients(self, branch: int, active: bool) -> Iterator[None]:
        """Gradients that a branch has accumulated are in place for its turn."""
        if not active:
            yield
            return
        parameters = list(self._branches.module.parameters())
        for parameter in parameters:
            parameter.grad = self._gradients.get((branch, parameter))
        yield
        self._gradients |= {(branch, parameter): parameter.grad for parameter in parameters}

    def _step_scheduler(self, original: Callable[..., Any], scheduler: Any, metric: Any) -> None:
        """Schedules that count steps move when every branch of the group has trained at this rate."""
        configs = self._trainer.lr_scheduler_configs
        by_step = any(config.scheduler is scheduler and config.interval == "step" for config in configs)
        if self._progress.turn == 0 or not by_step:
            original(scheduler, metric)
