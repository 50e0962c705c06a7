"""The turns that branches take at the batches of a fit."""

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lightning_merge._whole_steps import is_around
from lightning_merge.branches import OnePerRank
from lightning_merge.callbacks._branch_run._fit import Fit
from lightning_merge.callbacks._branch_run._later import Later
from lightning_merge.callbacks._branch_run._progress import Progress
from lightning_merge.callbacks._branch_run._rates import Rates
from lightning_merge.callbacks._branch_run._settings import Augmentation as Augmentation
from lightning_merge.callbacks._branch_run._settings import Settings
from lightning_merge.callbacks._branch_run._streams import parts
from lightning_merge.callbacks._lightning._batch_copies import own_copy
from lightning_merge.callbacks._lightning._internals import accumulates, log_for
from lightning_merge.callbacks._lightning._patches import Patches
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches


@final
class Turns:
    """Stands around Lightning's training step and takes each batch through the branches that it is for.

    Args:
        settings: Say which batches are whose, and how they are augmented.
        steps: Counts the applied optimizer steps so far.
        trainer: The Trainer of the fit.
        fit: The branches; if this process holds one only, that one has every turn. It is told when groups are over.
        progress: Where turns and groups are counted.
        recent: Where batches are kept, if they are.
    """

    def __init__(
        self,
        settings: Settings,
        steps: Callable[[], int],
        trainer: Any,
        fit: Fit,
        progress: Progress,
        recent: RecentBatches | None,
    ) -> None:
        self._settings = settings
        self._steps = steps
        self._trainer = trainer
        self._fit = fit
        self._branches = branches = fit.branches
        self._progress = progress
        self._recent = recent
        self._apart = isinstance(branches, OnePerRank)  # the others train in other processes
        self._everyone = settings.batches != "turns" and not self._apart
        self._own = settings.batches == "own"
        self._gradients: dict[tuple[int, Tensor], Tensor | None] = {}  # that branches are accumulating
        self._rates: Rates | None = None
        self._later: Later | None = None
        self._counted: bool | None = None  # whether steps of the optimizer have been seen, once a turn was taken

    def wrap(self, patches: Patches) -> None:
        """Takes the place of the training step until the fit ends."""
        loop = self._trainer.fit_loop.epoch_loop
        patches.replace(loop.automatic_optimization, "run", self._automatic)
        patches.replace(loop.manual_optimization, "run", self._manual)
        patches.replace(self._trainer.strategy, "optimizer_step", self._step)
        if self._in_groups:
            patches.replace(loop, "update_lr_schedulers", self._update_schedules)

    @property
    def _in_groups(self) -> bool:
        """Whether batches of the loader are single steps, and schedules move once per group all the same."""
        return self._settings.batches == "turns" and self._settings.schedulers == "group"

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
        before = self._written()

        def ends() -> bool:
            # The module accumulates gradients as it likes: a turn is over when the optimizer has stepped. Processes
            # have to agree on that also if a gradient scaler has skipped the step of one. An optimizer whose `step` is
            # never called, as that of SAM in two steps, is known by what it writes to.
            if self._steps() > steps:
                self._counted = True
            called = self._apart and bool(progress.total.completed > calls)
            return self._steps() > steps or called or (not self._counted and self._written() != before)

        return self._train(original, kwargs, progress, ends, keep_gradients=True)

    def _step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if self._later is not None:
            self._later.stepped()
        return result

    def _written(self) -> list[int]:
        """How often each parameter of the optimizer that ends turns was written to, as far as torch counts it."""
        groups = self._trainer.optimizers[self._settings.optimizer].param_groups
        return [parameter._version for group in groups for parameter in group["params"]]

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
        self._refuse_other_optimizers()
        self._fit.look_before_turns()
        counts = [vars(each) for each in (progress.total, progress.current)]
        counted = [dict(each) for each in counts]
        output = None
        for number, branch in enumerate(self._turns(kwargs)):
            if self._everyone and number:
                for own, before in zip(counts, counted, strict=True):
                    own |= before
            if number == 0 or branches.buffers == "average":
                # The turn before may have assigned anew what is exchanged.
                self._fit.publisher.look(before_step=not keep_gradients and branches.buffers != "average")
            branches.activate(branch)
            self._enter(branch, again=number > 0, keep_gradients=keep_gradients)
            steps = self._steps()
            output = original(self._own_batch(branch, kwargs, again=number > 0))
            branches.steps[branch] += max(self._steps() - steps, int(ends() and self._counted is None))
            self._leave(branch, keep_gradients=keep_gradients)
            if self._recent is not None:
                self._recent.keep()
            if self._everyone or ends():
                ours.turn = branches.count if self._apart else branch + 1
            if ends() or not self._trainer.lightning_module.automatic_optimization:
                ours.trained += 1  # whichever optimizer has stepped, of Lightning's or of the module's own
        if self._everyone:
            ours.turn = branches.count  # the last ones may have had no batch
        if ours.turn == branches.count:
            ours.turn = 0
            if self._later is not None:
                self._later.group_over()
            if ends():
                ours.groups += 1
                self._fit.end_group()
        self._fit.mark()
        return output

    def _refuse_other_optimizers(self) -> None:
        now, ours = self._trainer.optimizers, self._branches.optimizers
        if len(now) != len(ours) or not all(map(is_around, now, ours)):
            raise ValueError(
                f"{self._settings.title}: the optimizers of the Trainer were replaced after the fit began, and branches"
                " own the states of those before. Set them up in `configure_optimizers`, and add what is trained later"
                " by `optimizer.add_param_group`."
            )

    def _turns(self, kwargs: dict[str, Any]) -> Sequence[int]:
        """The branches that the next batch is for."""
        if self._everyone:
            turns = range(self._progress.turn, self._branches.count)
            if not self._own or "batch" not in kwargs:
                return turns
            own = self._parts(kwargs["batch"])
            return [branch for branch in turns if own[branch] is not None]
        return [self._branches.active if self._apart else self._progress.turn]

    def _enter(self, branch: int, *, again: bool, keep_gradients: bool) -> None:
        """What the module keeps of its steps is the branch's, with the gradients that it has accumulated.

        Rates are those of the group.
        """
        if not self._apart and self._branches.count > 1:
            if self._rates is None:
                self._rates = Rates(self._branches, [each.scheduler for each in self._trainer.lr_scheduler_configs])
                self._later = Later(self._branches)
            if self._later is not None:
                self._later.enter()
            if not again:
                self._fit.frozen.look()
            self._fit.attributes.enter(branch, again=again)
            if self._everyone or self._in_groups:
                self._rates.enter(first=self._progress.turn == 0 and not again, again=again)
        if self._everyone and keep_gradients:
            for parameter in self._branches.module.parameters():
                parameter.grad = self._gradients.get((branch, parameter))

    def _leave(self, branch: int, *, keep_gradients: bool) -> None:
        if self._later is not None:
            self._later.leave()
        if self._rates is not None:
            self._fit.attributes.leave(branch)
            if written := self._fit.frozen.written():
                self._fit.adopt(written)
            if self._everyone or self._in_groups:
                self._rates.leave()
        if self._everyone and keep_gradients:
            self._gradients |= {(branch, parameter): parameter.grad for parameter in self._branches.module.parameters()}

    def _own_batch(self, branch: int, kwargs: dict[str, Any], *, again: bool) -> dict[str, Any]:
        """The arguments of the training step with the batch as this branch sees it."""
        if "batch" not in kwargs:
            raise TypeError(
                f"{self._settings.title} hands a batch to each branch, so `training_step` must take a batch, not"
                " `dataloader_iter`."
            )
        batch = kwargs["batch"]
        if self._own:
            batch = self._parts(batch)[branch]
            log_for(self._trainer, batch)
        elif self._everyone and branch < self._branches.count - 1:
            # A step may write to its batch, and no version counter sees writes through `.data` or numpy: always copied.
            batch = own_copy(batch, self._settings.title)
        if self._settings.augmentations is not None:
            with torch.no_grad():
                batch = self._settings.augmentations[branch](batch)
        if self._recent is not None:
            self._recent.hold(batch, again=again and self._settings.augmentations is None and not self._own)
        return OrderedDict(kwargs, batch=batch)

    def _parts(self, batch: Any) -> list[Any]:
        return parts(self._trainer, batch, self._branches.count, self._settings.title)

    def _update_schedules(self, original: Callable[..., Any], interval: str, *args: Any, **kwargs: Any) -> None:
        """Schedules that count steps move when every branch of the group has trained at this rate."""
        configs = [each for each in self._trainer.lr_scheduler_configs if each.interval == "step"]
        frequencies = [each.frequency for each in configs]
        over = self._progress.turn == 0
        try:
            for each, frequency in zip(configs, frequencies, strict=True):
                each.frequency = 1 if over and self._progress.groups % frequency == 0 else sys.maxsize
            original(interval, *args, **kwargs)
        finally:
            for each, frequency in zip(configs, frequencies, strict=True):
                each.frequency = frequency
