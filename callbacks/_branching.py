"""The one callback that trains several branches of a module. Named callbacks choose a policy and a schedule for it."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_merge import weights
from lightning_merge._checks import function, instance, one_of, sequence, whole
from lightning_merge.branches import Branches, Policy
from lightning_merge.branches._base import MOST
from lightning_merge.branches._in_turn import Inactive
from lightning_merge.callbacks._branch_run import _placement as placement
from lightning_merge.callbacks._branch_run._divergence import Divergence
from lightning_merge.callbacks._branch_run._progress import Progress
from lightning_merge.callbacks._branch_run._turns import Augmentation, Turns
from lightning_merge.callbacks._branch_strategy import BranchStrategy
from lightning_merge.callbacks._lightning._measure import Score, measured, refuse_without_score
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._run import resolved
from lightning_merge.callbacks._publication._callback import Published, Validate
from lightning_merge.schedules import EveryNSteps, Moment, Schedule
from lightning_merge.selections import Selection
from lightning_merge.weights import State, Weights

Batches = Literal["same", "turns"]
OptimizerState = Literal["keep", "average", "reset"]
Buffers = Literal["shared", "average", "recompute"]


class Branching(Published):
    """Trains K branches of the module at once and mixes them by a policy; their mean is what is published.

    A *group* is one training step of every branch. With ``batches="same"`` a batch of the loader is one group: it goes
    through every branch, in the version that the branch's augmentation makes of it. An epoch, ``max_steps``,
    ``global_step`` and learning-rate schedules then mean what they mean without the callback, and the run takes K times
    the computation. With ``batches="turns"`` successive batches go to successive branches: an epoch takes no more
    computation, ``max_steps`` and ``global_step`` count the steps of all branches, and schedules of the interval
    ``"step"`` move once per group, so that all branches of a group train at the same rate.

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
        batches: ``"same"`` batch for all branches of a group, or ``"turns"``.
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

    others: Literal["refuse", "own"] = "refuse"
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
        schedulers: Literal["group", "step"] = "group",
        selection: Selection | None = None,
        validate: Validate = "merged",
        name: str = "branches",
        optimizer: int = 0,
    ) -> None:
        super().__init__(validate, name, optimizer)
        instance("policy", policy, Policy)
        schedule = EveryNSteps() if schedule is None else instance("schedule", schedule, Schedule)
        branches = whole("branches", branches, 1, MOST)
        if score is not None:
            function("score", score)
        if selection is not None:
            instance("selection", selection, Selection)
        if augmentations is not None:
            augmentations = _checked_augmentations(augmentations, branches)
        for argument, chosen, allowed in (
            ("batches", batches, Batches),
            ("optimizer_state", optimizer_state, OptimizerState),
            ("buffers", buffers, Buffers),
            ("inactive", inactive, Inactive),
            ("schedulers", schedulers, Literal["group", "step"]),
        ):
            one_of(argument, chosen, allowed, f"one of {', '.join(map(repr, get_args(allowed)))}")
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

        self._active_schedule = schedule
        self._set: Branches | None = None
        self._strategy: BranchStrategy | None = None  # one branch per process
        self._policy_state: State | None = None
        self._saved: State | None = None  # branches of a file or of an earlier fit, until there are live ones
        self._progress = Progress()
        self._divergence = Divergence(self.title, self._progress)
        self._mean: Weights | None = None  # of the weights as they are now

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
        # The mean of several processes cannot be made any more when one of them has failed.
        failed = self._strategy is not None and self._publisher is not None and self._publisher.interrupted
        return self._set is not None and self._progress.trained > 0 and not (failed and self._mean is None)

    @property
    def equal(self) -> bool:
        """Whether all branches are the same, since none has trained after the last merge."""
        return self._progress.equal

    def merged(self) -> Weights | None:
        """The mean of all branches; of equal ones it is any, the live one at no cost."""
        if not self.ready:
            return None
        if self._mean is None:
            assert self._set is not None
            assert self._publisher is not None
            with torch.inference_mode(False), torch.no_grad():
                raw = self._publisher.raw(self)
                live = self._set.live
                if self.equal:
                    self._mean = {name: raw[name].to(weights.average_dtype(raw[name])) for name in live}
                else:
                    self._mean = self.policy.published(self._policy_state or {}, self._set, raw)
                    self._publisher.fit_vectors_(self, self._mean)
                self._buffers = weights.copies({name: raw[name] for name in self._shared_buffers})
                self._calibrated_at = None
        return {**self._mean, **self._buffers}

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {} if self._set is None else {**self._set.live, **self._shared_buffers}

    @property
    def _shared_buffers(self) -> Weights:
        """The live buffers that there is one set of."""
        if self._publisher is None or self._set is None:
            return {}
        branched = self._set.live  # with `average`, all but masks and bounds
        return {name: b for name, b in self._publisher.inventory.buffers.items() if name not in branched}

    @property
    def _trained_tensors(self) -> dict[str, Tensor]:
        """What is branched, and what all branches share and train: parameters that are not selected, say."""
        assert self._publisher is not None
        parameters = self._publisher.inventory.parameters
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        return {**trainable, **self.tensors}

    def describe(self) -> str:
        assert self._set is not None
        size = sum(tensor.numel() * tensor.element_size() for tensor in self._set.live.values())
        return (
            f"{self.branches} branches of {len(self._set.live)} tensors ({size / 1e6:,.1f} MB a branch), mixed by"
            f" {self.policy!r} at {self.schedule!r}; optimizer state: {self.optimizer_state}, buffers: {self.buffers}"
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.policy!r}, {self.schedule!r}, branches={self.branches}, name={self.name!r})"
        )

    # ---- a fit begins and ends

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Refuses strategies that cannot exchange weights and a second set of branches."""
        others = [
            callback for callback in trainer.callbacks if isinstance(callback, Branching) and callback is not self
        ]
        if others:
            raise ValueError(f"one Trainer trains one set of branches: remove {self.title} or {others[0].title}.")
        self._strategy = placement.strategy_of(self, trainer)
        if self._strategy is not None and stage == "fit":
            self._strategy.place(self.branches, same_batches=self.batches == "same")
        super().setup(trainer, pl_module, stage)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Makes the branches, or goes on with those of an earlier fit or a checkpoint."""
        super().on_fit_start(trainer, pl_module)
        publisher = self._publisher
        assert publisher is not None
        steps_per = self.branches if self.batches == "turns" and self._strategy is None else 1
        (self._active_schedule,) = resolved(trainer, [self.schedule], steps_per)
        if self._set is not None and not self._resumed:
            goes_on = not publisher.is_apart
            # A process of its own has its branch in the module again.
            apart: State = {"active": 0, "weights": {}, "optimizers": {}}
            kept = self._set.save() if self._strategy is None else apart
            self._saved = kept if goes_on else None
            publisher.continue_fit(self)
        self._mean = None
        self._set = placement.made(self, trainer, pl_module, apart=self._saved is not None)
        if self.policy.needs_score:
            refuse_without_score(self.title, trainer, pl_module, self.score)
            self._set.scorer = self._measure
        if self._saved is not None:
            if "constant" in self._saved:  # not in files of earlier versions
                self._set.leave_alone(self._saved["constant"])
            placement.check_saved(self.title, self._set, self._saved)
            self._set.load(self._saved)
            self._set.steps = list(self._saved.get("steps", self._set.steps))
        else:
            self._progress.merged_at = self._progress.trained
        if self._policy_state is None:
            self._policy_state = self.policy.init(self._set)
        if self.buffers == "recompute":
            self._keep_recent_batches()
        turns = Turns(self, trainer, self._set, self._progress, self._recent, self._end_group)
        turns.wrap(publisher.patches)
        publisher.begin(self, trainer.optimizers[self.optimizer])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Every branch starts with the optimizers as they are now, after everything was restored."""
        assert self._set is not None
        if not self._resumed:
            self._progress.epochs = trainer.current_epoch
        if self._saved is None or not self._saved["optimizers"]:
            self._set.fork_optimizers()
        else:
            self._set.load_optimizers(self._saved)
        self._saved = None
        if self.policy.restarts and not self._divergence.good:
            self._divergence.remember(self._trained_tensors)

    @property
    def watches_training(self) -> bool:
        return self.selection is None or self.selection.trainable

    def look_again(self) -> None:
        """Finds parameters that were replaced or unfrozen."""
        if self._set is not None:
            self._set.refresh()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What was the mean is not any more."""
        assert self._publisher is not None
        self._publisher.look()
        self._mean = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The end of an epoch is its last batch, so that the validation that follows measures the merge."""
        if trainer.is_last_batch:
            self._end_epoch(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """An epoch that was cut short ends here, after its validation."""
        self._end_epoch(trainer)

    def _end_epoch(self, trainer: Trainer) -> None:
        completed = trainer.current_epoch + 1
        if completed > self._progress.epochs:
            self._progress.epochs = completed
            self._merge(trainer, Moment(self.groups, completed, epoch_end=True))

    # ---- merging

    def _end_group(self) -> None:
        assert self._publisher is not None
        trainer = self._publisher.trainer
        self._merge(trainer, Moment(self.groups, trainer.current_epoch))

    def _merge(self, trainer: Any, moment: Moment) -> None:
        if not self._active_schedule.due(moment):
            return
        assert self._set is not None
        assert self._policy_state is not None
        self._mean = None
        diverged = self._set.diverged()
        if len(diverged) == self.branches:
            self._divergence.go_back(self._set, self._trained_tensors)
            trainer.should_stop = True
            return
        if diverged:
            self._divergence.revive(self._set, diverged, self._trained_tensors)
        self.policy.merge(self._policy_state, self._set)
        if self.optimizer_state == "average":
            self._set.average_optimizers()
        elif self.optimizer_state == "reset":
            self._set.reset_optimizers(set(self._set.own))
        self._progress.merges += 1
        self._set.steps = [0] * self.branches
        if self.policy.restarts:
            self._progress.merged_at = self._progress.trained
            self._divergence.remember(self._trained_tensors)

    def _measure(self, candidate: Weights) -> float:
        """The score of any weights in the place of the branches, with BatchNorm statistics that fit them."""
        assert self._publisher is not None
        assert self._module is not None
        fitted = weights.like(candidate, self.tensors)
        fitted |= weights.like(self.statistics(candidate), self.tensors)
        with self._publisher.swapped(self, fitted):
            return measured(self._publisher.trainer, self._module, self.score)

    # ---- for the publisher

    def wants(self, moment: Moment) -> bool:
        """Never: it merges between turns, not right after a step."""
        return False

    def take_in(self, moment: Moment, nonfinite: set[str]) -> None:
        raise AssertionError("it never wants weights")

    def label(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "rule": repr(self.policy), "steps": self.steps, "updates": self.merges}

    def save(self) -> dict[str, Any]:
        assert self._publisher is not None
        failed = self._strategy is not None and self._publisher.interrupted
        branches = None if self._set is None or failed else self._set.save()
        if branches is not None and self.equal:
            branches["weights"] = {}  # all are the live one, which the file has
        if branches is not None and self._set is not None:
            branches["steps"] = self._set.work()
        return {
            "progress": asdict(self._progress),
            "branches": branches,
            "good": {} if self.equal else self._divergence.good,
            "policy": self._policy_state,
            "recent": None if self._recent is None else self._recent.saved(),
        }

    def load(self, saved: dict[str, Any], label: dict[str, Any]) -> None:
        if label["rule"] != repr(self.policy):
            rank_zero_warn(f"{self.title} goes on from a file that was written with {label['rule']}.")
        for field, value in saved["progress"].items():
            setattr(self._progress, field, value)
        self.steps = label["steps"]
        self._saved = saved["branches"]
        self._divergence.good = saved["good"]
        self._policy_state = saved["policy"]
        if saved["recent"] is not None:
            self._recent = RecentBatches.restored(saved["recent"])
        self._set = None
        self._resumed = True

    def to_host(self) -> None:
        host = torch.device("cpu")
        if self._set is not None:
            self._set.to_host()
        self._mean = weights.to_devices(self._mean, host)
        self._buffers = weights.to_devices(self._buffers, host)
        self._divergence.good = weights.to_devices(self._divergence.good, host)
        self._policy_state = weights.to_devices(self._policy_state, host)

    def note_the_end(self) -> None:
        if not self.merges:
            rank_zero_info(
                f"{self.title} merged nothing: {self.schedule!r} was not due in {self.groups} groups and"
                f" {self._progress.epochs} epochs. What is published is the mean of branches that never met; merge"
                " earlier."
            )


def _checked_augmentations(augmentations: object, branches: int) -> tuple[Augmentation, ...]:
    says = f"a function for each of the {branches} branches"
    found = sequence("augmentations", augmentations, says)
    if len(found) != branches:
        raise ValueError(f"`augmentations` must have one entry for each of the {branches} branches, got {len(found)}.")
    if not all(map(callable, found)):
        raise TypeError(f"`augmentations` must be {says}, got {found!r}.")
    return found
