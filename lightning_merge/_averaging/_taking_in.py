"""What an average by a rule does: it takes weights in, is told scores, and follows the module."""

from collections.abc import Mapping

from torch import Tensor

from lightning_merge import weights
from lightning_merge._averaging._elsewhere import Background, Taken, placed
from lightning_merge._averaging._rule_average import RuleAverage
from lightning_merge._averaging._tensors import Watched
from lightning_merge._averaging._undecided import Undecided, by_reference
from lightning_merge.schedules import Moment
from lightning_merge.weights import Finding, Weights


class TakingIn(RuleAverage):
    """An average that is told of steps and scores; its arguments are those of ``RuleAverage``."""

    _had_begun = False  # before the update that is under way in host memory

    # ---- taking weights in

    def wants(self, moment: Moment) -> bool:
        """Whether the average starts or takes weights in at this moment."""
        schedule = self._active_schedule
        # An update that is under way is not waited for where it is known that there is an average.
        is_known = self._had_begun and self._background is not None and self._background.is_busy
        return schedule.due(moment) if is_known or self._state is not None else schedule.started(moment)

    def take_in(self, moment: Moment, finding: Finding) -> None:
        """Starts the average if it has not started, and takes the live weights in if that is due.

        Where the device has not said yet whether the weights hold a NaN, they are taken in all the same, in a way that
        can be taken back; ``decide`` does that.

        Args:
            moment: Now.
            finding: Which live tensors hold a NaN or an infinity.
        """
        if self._tensors.is_elsewhere and self._active_rule.can_be_undone:
            self._take_in_beside(moment, finding)
            return
        if finding.is_there or not self._active_rule.can_be_undone or not self._tensors.has_room:
            self._take_in(moment, finding.names(), self._tensors.taken())
            return
        state, buffers = by_reference(self._state), by_reference(self._buffers)
        before = Undecided(finding, set(self.captured), self.steps, state, buffers, self.update_window)
        with weights.made_anew():
            self._take_in(moment, set(), self._tensors.taken())
        self._undecided = before

    def _take_in_beside(self, moment: Moment, finding: Finding) -> None:
        """Copies the weights into host memory, where they are taken in while the device goes on."""
        self._had_begun = self._state is not None  # which waits for the update before
        self._health_before = self._health()
        taken = self._tensors.sent()

        def update() -> None:
            taken.way.wait()
            self._take_in(moment, finding.names(), taken)

        self._background = self._background or Background()
        self._background.begin(update)

    def _take_in(self, moment: Moment, nonfinite: set[str], taken: Taken) -> None:
        if not self._start(nonfinite, moment.step, taken) or not self._active_schedule.due(moment):
            return
        if not self._active_rule.can_be_undone:
            if self._update(taken):
                self._note_update(moment.step, taken)
            return
        # The buffers first: the look for NaN has just read them, and after the update they are in no cache any more.
        self._note_update(moment.step, taken)
        with weights.joining():
            self._update(taken)

    def _note_update(self, step: int, taken: Taken) -> None:
        weights.copy_(self._buffers, taken.copied)
        window = self.update_window
        self.update_window = (window[0] if window else step, step)

    def _update(self, taken: Taken) -> bool:
        """Hands the weights to the rule; whether they were taken in."""
        self._active_rule.update(self._kept, taken.averaged)
        return True

    def begin(self, moment: Moment) -> None:
        """Starts the average if it is to have started at this moment, at which nothing is taken in."""
        if self._state is None and self._active_schedule.started(moment):
            self._start(weights.nonfinite(self.checked), moment.step, self._tensors.taken())

    def _start(self, nonfinite: set[str], step: int, taken: Taken) -> bool:
        """Whether there is an average, and weights fit for it."""
        if nonfinite and (culprits := nonfinite & self.captured.keys()):
            self._skip(min(culprits), step)
            return False
        if self._state is None:
            self._state = self._active_rule.init(taken.averaged)
            self._buffers = weights.copies(taken.copied)
        return True

    def _take_score(self, score: float) -> bool:
        """Tells the rule a score, lower is better; whether it was, for which the weights must be fit if it merges
        them."""
        rule = self._active_rule
        if rule.merges_when_scored and (culprits := weights.nonfinite(self.checked)):
            self._skip(min(culprits), self.steps)
            return False
        updates = self.updates
        taken = self._tensors.taken() if rule.merges_when_scored else Taken(self._tensors.live, {})
        rule.evaluate(self._kept, score, taken.averaged)
        if self.updates != updates and rule.merges_when_scored:
            self._note_update(self.steps, taken)
        self.evaluations += rule.wants_score == "raw"
        return True

    # ---- which tensors

    def _follow(self, module: Watched) -> None:
        """Looks the tensors up again, some of which were replaced, added, removed, frozen or unfrozen."""
        self.decide()
        change = self._tensors.follow(module, self.steps)
        if self._state is None:
            return
        if change.gone or change.fresh:
            self._active_rule.forget(self._state, [*change.gone, *change.fresh])
        if change.fresh:
            self._active_rule.extend(self._state, placed(weights.local(change.fresh), self._tensors.is_elsewhere))
        live = self._tensors.live_copied
        fitting = {n: b for n, b in self._buffers.items() if n in live and b.shape == live[n].shape}
        new = {name: tensor for name, tensor in live.items() if name not in fitting}
        self._buffers = {**fitting, **placed(weights.copies(new), self._tensors.is_elsewhere)}

    def _to_devices(self) -> None:
        """Brings a state from before to the model's devices."""
        devices = self._tensors.devices
        self._state = weights.in_large_pages(self._active_rule.load(self._kept, devices))
        self._buffers = weights.to_devices(self._buffers, devices)
        average = self._active_rule.stored(self._kept)
        moved = [name for name in average or () if name in self._tensors.copied]
        if moved:
            self._active_rule.forget(self._kept, moved)  # an earlier version averaged them
            self._buffers |= weights.copies({n: self._tensors.live_copied[n] for n in moved if n not in self._buffers})

    def _refuse_another_model(self, average: Mapping[str, Tensor], cure: str) -> None:
        """Raises if a state from before belongs to another model.

        Raises:
            ValueError: With the first name or shape that differs.
        """
        kept: Weights = {name: tensor for name, tensor in average.items() if name not in self._tensors.copied}
        if difference := weights.first_mismatch(self._tensors.live, kept):
            raise ValueError(f"{self._tensors.title} holds the average of another model: {difference}. {cure}")
