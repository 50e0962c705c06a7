"""The one callback that trains several branches of a module. Named callbacks choose a policy and a schedule for it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Unpack

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_merge import weights
from lightning_merge._checks import function, instance, whole
from lightning_merge.branches import Policy
from lightning_merge.branches._in_turn import Inactive
from lightning_merge.branches._matrix import MOST
from lightning_merge.callbacks._branch_run import _placement as placement
from lightning_merge.callbacks._branch_run._anchors import Anchors
from lightning_merge.callbacks._branch_run._fit import Fit
from lightning_merge.callbacks._branch_run._progress import Progress
from lightning_merge.callbacks._branch_run._saved import BranchesSaved, Earlier
from lightning_merge.callbacks._branch_run._settings import (
    Augmentation,
    Batches,
    Buffers,
    OptimizerState,
    Others,
    Schedulers,
    Settings,
    check_choices,
    checked_augmentations,
)
from lightning_merge.callbacks._branch_run._streams import watch_loaders
from lightning_merge.callbacks._branch_run._turns import Turns
from lightning_merge.callbacks._branch_strategy import BranchStrategy
from lightning_merge.callbacks._lightning._internals import ends_epoch
from lightning_merge.callbacks._lightning._measure import Score, refuse_without_score
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._run import resolved
from lightning_merge.callbacks._publication._callback import Published, Validate
from lightning_merge.callbacks._publication._options import AverageOptions, known
from lightning_merge.callbacks._publication._session import Publisher
from lightning_merge.schedules import EveryNSteps, Moment, Schedule
from lightning_merge.selections import Selection
from lightning_merge.weights import State, Weights


class Branching(Published):
    """Trains K branches of the module at once and mixes them by a policy; their mean is what is published.

    A *group* is one training step of every branch. With ``batches="same"`` a batch of the loader is one group: it goes
    through every branch, in the version that the branch's augmentation makes of it. An epoch, ``max_steps``,
    ``global_step`` and learning-rate schedules then mean what they mean without the callback, and the run takes K times
    the computation. With ``batches="turns"`` successive batches go to successive branches: an epoch takes no more
    computation, ``max_steps`` and ``global_step`` count the steps of all branches, and schedules of the interval
    ``"step"`` move once per group, so that all branches of a group train at the same rate. With ``batches="own"`` the
    training loader is a list or a dict of loaders, one for each branch, and a batch of each is one group.

    Validation, files and the final model hold the mean of the branches; the raw weights are those of the branch that
    trained last. What an average promises holds here as well: see ``WeightMerging``.

    Args:
        policy: How branches mix.
        schedule: When, in groups; by default after every group.
        branches: Number of branches; at least 1.
        score: For policies that measure: ``score(module, batch)`` returns the sum of what is to be high over a batch of
            the validation loaders (of ``merge_dataloader()`` if the data module or the module has that), and the count
            to divide it by. By default the module's ``score_step(self, batch)``.
        augmentations: One callable per branch that takes the batch, on its device, and returns the batch its branch
            trains on. By default branches train on the batch as it is.
        batches: ``"same"`` batch for all branches of a group, ``"turns"``, or ``"own"``: each branch has a loader of
            its own. Where these differ in length Lightning's ``CombinedLoader(loaders, mode)`` says what an epoch is; a
            branch whose loader is through under the mode ``"max_size"`` waits for the others.
        optimizer_state: At a merge, ``"keep"`` the optimizer state of each branch, ``"average"`` or ``"reset"`` it.
        buffers: ``"shared"``: one set, updated by all branches. ``"average"``: each branch has its own, which mix with
            the weights. ``"recompute"``: shared, and BatchNorm statistics are measured again under the published mean.
        inactive: Where the branches that do not train at the moment are: ``"device"`` or ``"cpu"``.
        schedulers: With ``batches="turns"``, whether schedules of the interval ``"step"`` move per ``"group"`` or per
            ``"step"`` of a branch.
        selection: Which parameters are branched; by default all trainable ones. Others are shared.
        validate: Which weights validation measures, ``"merged"`` (the mean), ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files; unique in the Trainer.
        optimizer: Index of the optimizer whose step ends a branch's turn, where there are several.
        options: ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``AverageOptions``.

    Attributes:
        groups: Groups completed so far.
        merges: Merges so far.
        revived: Times that a branch had diverged at a merge and went on from the mean of the others.

    Raises:
        TypeError: If ``policy`` is not a policy or ``schedule`` not a schedule.
        ValueError: If another argument is out of range, or at fit start if it does not fit the run.

    Example:
        >>> from lightning_merge.branches import Average
        >>> Branching(Average(), EveryNSteps(5), branches=3).name
        'branches'
    """

    others: Others = "refuse"
    """What trains without being selected, with a branch per process: an error, or each branch's own."""

    def __init__(
        self,
        policy: Policy,
        schedule: Schedule | None = None,
        branches: int = 3,
        *,
        score: Score | None = None,
        augmentations: Sequence[Augmentation] | None = None,
        batches: Batches = "same",
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "recompute",
        inactive: Inactive = "device",
        schedulers: Schedulers = "group",
        selection: Selection | None = None,
        validate: Validate = "merged",
        name: str = "branches",
        optimizer: int = 0,
        **options: Unpack[AverageOptions],
    ) -> None:
        super().__init__(validate, name, optimizer, **known(options, AverageOptions, self))
        instance("policy", policy, Policy)
        schedule = EveryNSteps() if schedule is None else instance("schedule", schedule, Schedule)
        branches = whole("branches", branches, 1, MOST)
        if score is not None:
            function("score", score)
        if selection is not None:
            instance("selection", selection, Selection)
        augmentations = checked_augmentations(augmentations, branches)
        check_choices(batches, optimizer_state, buffers, inactive, schedulers)
        self.policy = policy
        self.schedule = schedule
        self.branches = branches
        self.score = score
        self.augmentations = augmentations
        self.batches: Batches = batches
        self.optimizer_state: OptimizerState = optimizer_state
        self.buffers: Buffers = buffers
        self.inactive: Inactive = inactive
        self.schedulers = schedulers
        self.selection = selection

        self._strategy: BranchStrategy | None = None  # one branch per process
        self._progress = Progress()
        self._anchors: Anchors | None = None  # what holds the branches, in subclasses
        self._loaded: BranchesSaved | None = None  # of a file, until the fit starts
        self._fit: Fit | None = None

    # ---- what there is

    @property
    def groups(self) -> int:
        """Groups completed so far."""
        return self._progress.groups

    @property
    def merges(self) -> int:
        """Merges so far."""
        return self._progress.merges

    @property
    def revived(self) -> int:
        """Times that a branch had diverged at a merge and went on from the mean of the others."""
        return self._progress.revived

    @property
    def updates(self) -> int:
        return self.merges

    @property
    def version(self) -> tuple[int, int]:
        return self._progress.trained, self.merges

    @property
    def ready(self) -> bool:
        return self._fit is not None and self._progress.trained > 0 and not (self._is_lost and self._fit.mean is None)

    @property
    def equal(self) -> bool:
        """Whether all branches are the same, since none has trained after the last merge."""
        return self._progress.equal

    def merged(self) -> Weights | None:
        """The mean of all branches; of equal ones it is any, the live one at no cost."""
        fit = self._fit
        if fit is None or not self.ready:
            return None
        if fit.mean is None:
            self._buffers, self._calibrated_at = fit.take_mean(), None
        return {**(fit.mean or {}), **self._buffers}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {} if self._fit is None else self._fit.tensors

    @property
    def _is_lost(self) -> bool:
        """Whether the branches of other processes cannot be reached any more, since one has failed."""
        return self._strategy is not None and self._publisher is not None and self._publisher.interrupted

    @property
    def _running(self) -> Fit:
        if self._fit is None:
            raise RuntimeError(f"{self.title} has not been part of a fit yet, so it has no branches.")
        return self._fit

    @property
    def _policy_state(self) -> State | None:
        if self._fit is not None:
            return self._fit.state
        return None if self._loaded is None else self._loaded.policy

    @property
    def _settings(self) -> Settings:
        return Settings(**{field.name: getattr(self, field.name) for field in fields(Settings)})

    def describe(self) -> str:
        live = self._running.branches.live
        size = sum(tensor.numel() * tensor.element_size() for tensor in live.values())
        return (
            f"{self.branches} branches of {len(live)} tensors ({size / 1e6:,.1f} MB a branch), mixed by"
            f" {self.policy!r} at {self.schedule!r}; optimizer state: {self.optimizer_state}, buffers: {self.buffers}"
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.policy!r}, {self.schedule!r}, branches={self.branches}, name={self.name!r})"
        )

    # ---- a fit begins and ends

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that cannot exchange weights and a second set of branches."""
        if others := [each for each in trainer.callbacks if isinstance(each, Branching) and each is not self]:
            raise ValueError(f"one Trainer trains one set of branches: remove {self.title} or {others[0].title}.")
        self._strategy = placement.strategy_of(self._settings, trainer, stage)
        super().setup(trainer, pl_module, stage)
        watch_loaders(self._settings, trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes room for the branches, and finds out whether they go on from an earlier fit or a checkpoint."""
        is_same = self._module is pl_module
        super().on_fit_start(trainer, pl_module)
        publisher, settings = Publisher.attach(trainer, pl_module), self._settings
        steps_per = self.branches if self.batches == "turns" and self._strategy is None else 1
        (schedule,) = resolved(trainer, [self.schedule], steps_per)
        earlier = self._earlier(publisher, is_same)
        branches = placement.made(settings, trainer, pl_module, apart=earlier.branches is not None)
        if self.policy.needs_score:
            refuse_without_score(self.title, trainer, pl_module, self.score)
        fit = Fit(settings, self, publisher, branches, schedule, self._progress, self._anchors)
        fit.go_on(earlier)
        self._fit, self._loaded = fit, None
        if self.buffers == "recompute":
            self._keep_recent_batches()
        Turns(settings, lambda: self.steps, trainer, fit, self._progress, self._recent).wrap(publisher.patches)
        publisher.begin(self, trainer.optimizers[self.optimizer])

    def _earlier(self, publisher: Publisher, is_same: bool) -> Earlier:
        """What a file, or an earlier fit of the same weights, holds."""
        if self._loaded is not None or (fit := self._fit) is None:
            return Earlier() if self._loaded is None else self._loaded.earlier
        if publisher.is_apart or not (publisher.is_continued or is_same):
            self._start_anew()
            return Earlier()
        publisher.continue_fit(self)
        return fit.kept()

    def _start_anew(self) -> None:
        """Another model, or other weights: nothing of the earlier fit is about them."""
        rank_zero_info(f"{self.title} starts anew: the live weights are not those that its last fit left.")
        self._fit, self._recent, self._buffers, self._calibrated_at = None, None, {}, None
        self._progress, self.steps = Progress(), 0
        if self._anchors is not None:
            self._anchors.held = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Epochs before a fit that goes on are not looked at again."""
        super().on_train_start(trainer, pl_module)
        if not self._resumed:
            self._progress.epochs = trainer.current_epoch

    @property
    def watches_training(self) -> bool:
        return self.selection is None or self.selection.trainable

    @property
    def shared(self) -> Weights:
        """Parameters that are frozen or not selected."""
        return {} if self._fit is None else self._fit.shared_parameters

    def look_again(self) -> None:
        """Finds parameters that were replaced or unfrozen."""
        if self._fit is not None:
            self._fit.refresh()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What was the mean is not any more."""
        self._running.mean = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The end of an epoch is its last batch, so that the validation that follows measures the merge."""
        if ends_epoch(trainer):
            self._running.end_epoch()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch that was cut short ends here, after its validation."""
        self._running.end_epoch()

    # ---- for the publisher

    def wants(self, moment: Moment) -> bool:
        """After every step if anchors follow the branches; they merge between turns, not right after a step."""
        return self._anchors is not None

    def take_in(self, moment: Moment, finding: weights.Finding) -> None:
        """Anchors follow; one that a diverged branch has spoiled begins anew with the next merge."""
        if self._anchors is not None:
            self._anchors.follow(self._running.branches)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The anchor of the branch that trains in place of its weights; without anchors, the mean of the branches."""
        if self._anchors is None:
            with super().in_place():
                yield
            return
        fit = self._running
        with fit.publisher.swapped(self, weights.like(self._anchors.held[fit.branches.active], fit.branches.live)):
            yield

    def label(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "rule": repr(self.policy), "steps": self.steps, "updates": self.merges}

    def save(self) -> dict[str, Any]:
        recent = None if self._recent is None else self._recent.saved()
        if self._fit is not None:
            return self._fit.saved(recent, self._is_lost).section()
        anchors: dict[int, Weights] | None = None if self._anchors is None else {}
        return (self._loaded or BranchesSaved(self._progress, None, {}, None, recent, anchors)).section()

    def load(self, saved: dict[str, Any], label: dict[str, Any]) -> None:
        found = BranchesSaved.of(saved)
        placement.check_policy(self.title, self.policy, label["rule"], found.policy)
        self._fit, self._loaded = None, found
        self._progress = self._loaded.progress
        self.steps = label["steps"]
        if self._anchors is not None:
            self._anchors.held = self._loaded.anchors or {}
        if self._loaded.recent is not None:
            self._recent = RecentBatches.restored(self._loaded.recent)
        self._resumed = True

    def to_host(self) -> None:
        if self._fit is not None:
            self._fit.to_host(self._is_lost)
        self._buffers = weights.to_devices(self._buffers, torch.device("cpu"))

    def note_the_end(self) -> None:
        if not self.merges:
            rank_zero_info(
                f"{self.title} merged nothing: {self.schedule!r} was not due in {self.groups} groups and"
                f" {self._progress.epochs} epochs. What is published is the mean of branches that never met; merge"
                " earlier."
            )
