"""The branches of one fit: when they merge, and what is published of them."""

from typing import Any, final

import torch
from torch import Tensor

from lightning_merge import weights
from lightning_merge.branches import Branches
from lightning_merge.callbacks._branch_run._anchors import Anchors
from lightning_merge.callbacks._branch_run._divergence import Divergence
from lightning_merge.callbacks._branch_run._placement import check_saved
from lightning_merge.callbacks._branch_run._progress import Progress
from lightning_merge.callbacks._branch_run._saved import BranchesSaved
from lightning_merge.callbacks._branch_run._settings import Settings
from lightning_merge.callbacks._lightning._measure import measured
from lightning_merge.callbacks._publication._callback import Published
from lightning_merge.callbacks._publication._session import Publisher
from lightning_merge.schedules import Moment, Schedule
from lightning_merge.weights import State, Weights


@final
class Fit:
    """Merges the branches of a fit whenever the schedule says so.

    Args:
        settings: What is asked of them.
        average: What publishes their mean.
        publisher: Of the fit.
        branches: The branches, all as the module is.
        schedule: When they merge, in groups of this run.
        progress: Where merges are counted.
        anchors: What holds the branches, if anything does.

    Attributes:
        state: Of the policy.
        mean: The published mean of the branches as they are now; ``None`` until it is asked for.
    """

    def __init__(
        self,
        settings: Settings,
        average: Published,
        publisher: Publisher,
        branches: Branches,
        schedule: Schedule,
        progress: Progress,
        anchors: Anchors | None,
    ) -> None:
        self.publisher = publisher
        self.branches = branches
        self.state: State = {}
        self.mean: Weights | None = None
        self._settings = settings
        self._average = average
        self._schedule = schedule
        self._progress = progress
        self._divergence = Divergence(settings.title, progress)
        self._anchors = anchors
        self._saved: State | None = None  # what the branches were loaded from, until their optimizers are
        if settings.policy.needs_score:
            branches.scorer = self._measure

    # ---- it begins

    def load(self, saved: State | None, policy: State | None, good: Weights) -> None:
        """Goes on from a file, or from an earlier fit.

        Args:
            saved: The branches; ``None``: they start from the module.
            policy: State of the policy, if there is one.
            good: The last good weights.

        Raises:
            ValueError: If the branches are of another model.
        """
        self._saved = saved
        self._divergence.good = good
        if saved is not None:
            if "constant" in saved:  # not in files of earlier versions
                self.branches.leave_alone(saved["constant"])
            check_saved(self._settings.title, self.branches, saved)
            self.branches.load(saved)
            self.branches.steps = list(saved.get("steps", self.branches.steps))
        else:
            self._progress.merged_at = self._progress.trained
        self.state = self._settings.policy.init(self.branches) if policy is None else policy

    def start(self) -> None:
        """Every branch starts with the optimizers as they are now, after everything was restored."""
        if self._saved is None or not self._saved["optimizers"]:
            self.branches.fork_optimizers()
        else:
            self.branches.load_optimizers(self._saved)
        self._saved = None
        if self._settings.policy.restarts and not self.good:
            self._divergence.remember(self._trained_tensors)
        if self._anchors is not None and self._progress.equal:
            self._anchors.restart(self.branches)
        elif self._anchors is not None:
            self._anchors.complete(self.branches)

    # ---- which tensors

    @property
    def good(self) -> Weights:
        """The last weights that all branches went on from."""
        return self._divergence.good

    @property
    def tensors(self) -> dict[str, Tensor]:
        """What is published: the branched tensors, and the buffers that there is one set of."""
        return {**self.branches.live, **self.shared_buffers}

    @property
    def shared_buffers(self) -> Weights:
        """The live buffers that there is one set of."""
        branched = self.branches.live  # with `average`, all but masks and bounds
        return {name: b for name, b in self.publisher.inventory.buffers.items() if name not in branched}

    @property
    def shared_parameters(self) -> Weights:
        """The live parameters that there is one set of."""
        branched, parameters = self.branches.live, self.publisher.inventory.parameters
        return weights.local({name: p.detach() for name, p in parameters.items() if name not in branched})

    @property
    def _trained_tensors(self) -> dict[str, Tensor]:
        """What is branched, and what all branches share and train: parameters that are not selected, say."""
        parameters = self.publisher.inventory.parameters
        trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        return {**trainable, **self.tensors}

    def refresh(self) -> None:
        """Finds parameters that were replaced or unfrozen."""
        self.branches.refresh()
        if self._anchors is not None and self._anchors.held:
            self._anchors.complete(self.branches)

    # ---- merging

    def end_group(self) -> None:
        """Merges if that is due after a group."""
        self.merge(Moment(self._progress.groups, self.publisher.trainer.current_epoch))

    def end_epoch(self) -> None:
        """Merges if that is due at the end of an epoch, which several hooks may see."""
        completed = self.publisher.trainer.current_epoch + 1
        if completed > self._progress.epochs:
            self._progress.epochs = completed
            self.merge(Moment(self._progress.groups, completed, epoch_end=True))

    def merge(self, moment: Moment) -> None:
        """Merges if that is due."""
        if self._schedule.due(moment):
            self._merge()
        if self._anchors is not None and self._progress.equal:
            self._anchors.restart(self.branches)

    def _merge(self) -> None:
        branches, settings = self.branches, self._settings
        self.mean = None
        diverged = branches.diverged()
        if len(diverged) == branches.count:
            self._divergence.go_back(branches, self._trained_tensors)
            self.publisher.trainer.should_stop = True
            return
        if diverged:
            self._divergence.revive(branches, diverged, self._trained_tensors)
        settings.policy.merge(self.state, branches)
        if settings.optimizer_state == "average":
            branches.average_optimizers()
        elif settings.optimizer_state == "reset":
            branches.reset_optimizers(set(branches.own))
        self._progress.merges += 1
        branches.steps = [0] * branches.count
        if settings.policy.restarts:
            self._progress.merged_at = self._progress.trained
            self._divergence.remember(self._trained_tensors)

    def _measure(self, candidate: Weights) -> float:
        """The score of any weights in the place of the branches, with BatchNorm statistics that fit them."""
        fitted = weights.like(candidate, self.tensors)
        fitted |= weights.like(self._average.statistics(candidate), self.tensors)
        with self.publisher.swapped(self._average, fitted):
            return measured(self.publisher.trainer, self.publisher.module, self._settings.score)

    def mean_of(self, raw: Weights) -> Weights:
        """The mean of all branches, ``raw`` being the live one; of equal ones it is any, the live one at no cost."""
        if self._progress.equal:
            return {name: raw[name].to(weights.average_dtype(raw[name])) for name in self.branches.live}
        mean = self._settings.policy.published(self.state, self.branches, raw)
        self.publisher.fit_vectors_(self._average, mean)
        return mean

    # ---- it is saved, and ends

    def saved(self, recent: Any, lost: bool) -> BranchesSaved:
        """What a file keeps.

        Args:
            recent: The batches kept for BatchNorm statistics.
            lost: Whether branches in other processes cannot be reached any more.
        """
        equal = self._progress.equal
        branches = None if lost else self.branches.save()
        if branches is not None and equal:
            branches["weights"] = {}  # all are the live one, which the file has
        if branches is not None:
            branches["steps"] = self.branches.work()
        return BranchesSaved(
            progress=self._progress,
            branches=branches,
            good={} if equal else self.good,
            policy=self.state,
            recent=recent,
            anchors=None if self._anchors is None else {} if equal else self._anchors.held,
        )

    def to_host(self) -> None:
        """Follows the module to host memory."""
        host = torch.device("cpu")
        self.branches.to_host()
        self.mean = weights.to_devices(self.mean, host)
        self._divergence.good = weights.to_devices(self.good, host)
        self.state = weights.to_devices(self.state, host)
        if self._anchors is not None:
            self._anchors.to_host()
