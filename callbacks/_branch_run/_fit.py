"""The branches of one fit: when they merge, and what is published of them."""

from typing import Any, final

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_merge import weights
from lightning_merge.branches import Branches, OnePerRank
from lightning_merge.callbacks._branch_run._anchors import Anchors
from lightning_merge.callbacks._branch_run._divergence import Divergence
from lightning_merge.callbacks._branch_run._frozen import Frozen
from lightning_merge.callbacks._branch_run._outside import Outside, changed_since, sums
from lightning_merge.callbacks._branch_run._own import OwnAttributes
from lightning_merge.callbacks._branch_run._placement import check_saved
from lightning_merge.callbacks._branch_run._progress import Progress
from lightning_merge.callbacks._branch_run._saved import BranchesSaved, Earlier
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
        mean: The published mean of the branches as they are now; ``None`` until it is asked for.
        begun: Whether the branches are forked.
        earlier: What the branches go on from, until they are.
        outside: Notices what is changed between turns.
        attributes: What branches that take turns have of their own on the module beside weights.
        frozen: Notices parameters that turns write to without training them.
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
        self.mean: Weights | None = None
        self.begun = False
        self.outside = Outside(settings.title, branches.count)
        self.attributes = OwnAttributes(branches, settings.title)
        self.frozen = Frozen(branches, settings.title)
        self._state: State = {}
        self._settings = settings
        self._average = average
        self._schedule = schedule
        self._progress = progress
        self._divergence = Divergence(settings.title, progress)
        self._anchors = anchors
        self.earlier = Earlier()
        self._found: dict[str, str] = {}  # the module's tensors when the fit began, of branches that go on
        self._checked = settings.optimizer_state != "average"
        if settings.policy.needs_score:
            branches.scorer = self._measure

    # ---- it begins

    @property
    def state(self) -> State:
        """Of the policy."""
        return self._state if self.begun else self.earlier.policy or {}

    def go_on(self, earlier: Earlier) -> None:
        """Notes what a file, or an earlier fit, holds; ``begin`` takes it over."""
        self.earlier = earlier
        self._divergence.good = earlier.good
        if earlier.branches is not None:
            self._found = sums(self.publisher.inventory.tensors)

    def begin(self) -> None:
        """Forks the branches, at the first batch: by then hooks have loaded, tied and unfrozen what they do.

        Raises:
            ValueError: If the branches of a file are of another model.
        """
        if self.begun:
            return
        self.publisher.inventory.look_anew()
        self.begun, saved, policy, changed = True, self.earlier.branches, self.earlier.policy, list[str]()
        if saved is None:
            self.branches.restart()
            self._progress.merged_at = self._progress.trained
        else:
            self.branches.capture()
            if "constant" in saved:  # not in files of earlier versions
                self.branches.leave_alone(saved["constant"])
            check_saved(self._settings.title, self.branches, saved)
            changed, self._found = changed_since(self._found, self.publisher.inventory.tensors), {}
            self.branches.load(saved)
            self.branches.steps = list(saved.get("steps", self.branches.steps))
            if saved["optimizers"]:
                self.branches.load_optimizers(saved)
            else:
                self.branches.fork_optimizers()
        self._state = policy or self._settings.policy.init(self.branches)  # an empty one is of a policy that keeps none
        if saved is not None:
            self._settings.policy.look_again(self._state, self.branches)
            self._take_in(changed)
        self.earlier = Earlier()
        if not self.good:
            self._divergence.keep(self._settings.policy, self._state, self._trained_tensors)
        if self._anchors is not None:
            take_up = self._anchors.restart if self._progress.equal else self._anchors.complete
            take_up(self.branches)

    def _take_in(self, changed: list[str]) -> None:
        """Weights that a hook has changed are all branches' and all references'."""
        changed = [name for name in self.branches.live if name in changed]
        if not changed:
            return
        rank_zero_info(
            f"{self._settings.title}: {len(changed)} tensors, `{changed[0]}` first, were changed after the file was"
            " read and before the first batch. All branches go on from them."
        )
        self.branches.take(changed)
        self._settings.policy.start_again(self._state, self.branches, changed)
        live = self._trained_tensors
        self._divergence.good = self.good | weights.copies({name: live[name] for name in changed if name in self.good})
        if self._anchors is not None:
            self._anchors.forget(changed)

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

    def shared_buffers_of(self, raw: Weights) -> Weights:
        """Copies of the buffers that there is one set of; the last good ones of what a diverged branch has spoiled."""
        own = {name: raw[name] for name in self.shared_buffers}
        broken = weights.nonfinite(own) - weights.nonfinite(self.good) if self.branches.left_out else set()
        return weights.copies({name: self.good.get(name, t) if name in broken else t for name, t in own.items()})

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
        if not self.begun:
            return  # it looks then
        self.branches.refresh()
        self._take_up()

    def adopt(self, before: Weights) -> None:
        """Branches what a turn has written to without training it.

        Args:
            before: What it was before that turn.
        """
        # What the turn of another branch wrote to for the first time is its own by now.
        self.branches.adopt({name: t for name, t in before.items() if name not in self.branches.parameters})
        self._take_up()

    def _take_up(self) -> None:
        """What is branched from here on gets what the others have."""
        self._settings.policy.look_again(self._state, self.branches)
        if self._anchors is not None and self._anchors.held:
            self._anchors.complete(self.branches)

    # ---- merging

    def end_group(self) -> None:
        """Merges if that is due after a group."""
        if not self._checked:
            self._checked = True
            self.branches.check_optimizers()  # now, and not at a merge after hours
        self._settings.policy.after_group(self._state, self.branches)
        self.merge(Moment(self._progress.groups, self.publisher.trainer.current_epoch))

    def end_epoch(self) -> None:
        """Merges if that is due at the end of an epoch, which several hooks may see."""
        completed = self.publisher.trainer.current_epoch + 1
        if completed > self._progress.epochs:
            self._progress.epochs = completed
            self.merge(Moment(self._progress.groups, completed, epoch_end=True))
            self.mark()

    def merge(self, moment: Moment) -> None:
        """Merges if that is due."""
        if self._schedule.due(moment):
            self._merge()
        if self._anchors is not None and self._progress.equal:
            self._anchors.restart(self.branches)

    def mark(self) -> None:
        """From here on weights are to stay as they are until the next turn."""
        if not isinstance(self.branches, OnePerRank):
            self.outside.mark(self.branches.parameters)

    def look_before_turns(self) -> None:
        """At each batch: forks if it is the first, and notices what was changed since the last turn."""
        self.begin()
        if not isinstance(self.branches, OnePerRank) and self.outside.moved(
            self.branches.parameters, self.branches.active
        ):
            self._progress.trained += 1

    def _merge(self) -> None:
        branches, settings = self.branches, self._settings
        self.publisher.look()  # the last turn may have assigned a buffer anew
        self.mean = None
        diverged = branches.diverged()
        if len(diverged) == branches.count:
            self._divergence.go_back(branches, self._trained_tensors, settings.policy.last_good(self._state))
            self.publisher.trainer.should_stop = True
            return
        if diverged:
            self._divergence.revive(branches, diverged, self._trained_tensors)
            self.attributes.forget(diverged)
        settings.policy.merge(self._state, branches)
        if settings.optimizer_state == "average":
            branches.average_optimizers()
        elif settings.optimizer_state == "reset":
            branches.reset_optimizers(set(branches.own))
        self._progress.merges += 1
        branches.steps = [0] * branches.count
        if settings.policy.restarts:
            self._progress.merged_at = self._progress.trained
        self._divergence.keep(settings.policy, self._state, self._trained_tensors)

    def _measure(self, candidate: Weights) -> float:
        """The score of any weights in the place of the branches, with BatchNorm statistics that fit them."""
        fitted = weights.like(candidate, self.tensors)
        fitted |= weights.like(self._average.statistics(candidate), self.tensors)
        with self.publisher.swapped(self._average, fitted):
            return measured(self.publisher.trainer, self.publisher.module, self._settings.score)

    def take_mean(self) -> Weights:
        """Makes ``mean``; returns copies of the buffers that there is one set of."""
        with torch.inference_mode(False), torch.no_grad():
            self.begin()
            raw = self.publisher.raw(self._average)
            self.mean = self.mean_of(raw)
            return self.shared_buffers_of(raw)

    def mean_of(self, raw: Weights) -> Weights:
        """The mean of all branches, ``raw`` being the live one; of equal ones it is any, the live one at no cost."""
        if self._are_equal(raw):
            return {name: raw[name].to(weights.average_dtype(raw[name])) for name in self.branches.live}
        self.branches.left_out = set()
        mean = self._settings.policy.published(self._state, self.branches, raw)
        if 0 < len(self.branches.left_out) < self.branches.count:
            self._divergence.say_left_out(self.branches.left_out)
        self.publisher.fit_vectors_(self._average, mean)
        return mean

    def _are_equal(self, raw: Weights) -> bool:
        """Whether all branches are what they were when they met; a hook may have changed the active one."""
        if not self._progress.equal:
            return False
        if isinstance(self.branches, OnePerRank):
            return True  # where every branch passes every hook
        live = self.branches.live
        moved = [n for n, t in self.good.items() if n in live and n in raw and not torch.equal(t, raw[n].to(t))]
        if moved:
            self.outside.say(moved[0], self.branches.active)
            self._progress.trained += 1
        return not moved

    # ---- it is saved, and ends

    def kept(self) -> Earlier:
        """What another fit goes on from."""
        if not self.begun:
            return self.earlier
        # A process of its own has its branch in the module again.
        apart: State = {"active": 0, "weights": {}, "optimizers": {}}
        branches = apart if isinstance(self.branches, OnePerRank) else self.branches.save()
        return Earlier(branches, self._state, self.good)

    def saved(self, recent: Any, lost: bool) -> BranchesSaved:
        """What a file keeps.

        Args:
            recent: The batches kept for BatchNorm statistics.
            lost: Whether branches in other processes cannot be reached any more.
        """
        if not self.begun:
            held = None if self._anchors is None else self._anchors.held
            earlier = self.earlier
            return BranchesSaved(self._progress, earlier.branches, earlier.good, earlier.policy, recent, held)
        equal = self._are_equal(self.publisher.raw(self._average))
        branches = None if lost else self.branches.save()
        if not lost:
            self._settings.policy.settle(self._state, self.branches)
        if branches is not None and equal:
            branches["weights"] = {}  # all are the live one, which the file has
        if branches is not None:
            branches["steps"] = self.branches.work()
        anchors = None if self._anchors is None else {} if equal else self._anchors.held
        return BranchesSaved(self._progress, branches, {} if equal else self.good, self._state, recent, anchors)

    def to_host(self, lost: bool) -> None:
        """Follows the module to host memory."""
        if not lost:
            self._settings.policy.settle(self._state, self.branches)
        host = torch.device("cpu")
        self.branches.to_host()
        self.attributes = OwnAttributes(self.branches, self._settings.title)  # lets go of what is the module's
        self.frozen = Frozen(self.branches, self._settings.title)
        self.mean = weights.to_devices(self.mean, host)
        self._divergence.good = weights.to_devices(self.good, host)
        self._state = weights.to_devices(self._state, host)
        if self._anchors is not None:
            self._anchors.to_host()
