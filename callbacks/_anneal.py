"""Anneal: what a learning rate that decays would have given, as a mean of the weights at a constant one."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Unpack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._checks import function, whole
from lightning_merge.callbacks._averaging_run._window import refuse_another_plan, refuse_tokens, too_long
from lightning_merge.callbacks._lightning._run import planned_length
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import AnnealedMean, Rule, SlidingAnnealedMean
from lightning_merge.schedules import BeforeEnd, Duration, EveryNSteps, Moment, RunLength, Schedule
from lightning_merge.schedules._decay import Decay
from lightning_merge.selections import Selection, chosen
from lightning_merge.weights import Finding


class Anneal(WeightMerging):
    """What a decay of the learning rate over ``window`` would have given: the mean of its weights that stands for it.

    For runs at a constant rate; which weights count how much, and why, is in ``rules.AnnealedMean``. The learning rate
    itself stays as it is (``schedules.anneal`` and ``SWA(swa_lr=...)`` change one).

    By default the window is the end of the run, and takes one copy of the weights; from its first step on what it
    holds so far is validated and saved. With ``memory`` the window slides along: once it is full, what is validated and
    saved is what annealing would give now.

    Args:
        shape: Of the decay: ``"linear"`` (the plain mean), ``"cosine"``, ``"1-sqrt"`` or ``"exponential"``.
        window: Length of the decay: a number of optimizer steps, ``"500 steps"``, ``"2 epochs"`` or ``"20%"`` of the
            run; at least ``every_n_steps``. How long it is matters more than the shape.
        every_n_steps: Applied optimizer steps between the weights that are taken in; at least 1.
        memory: ``None`` for the window that ends with the run. A number for the sliding one: so many copies of the
            weights, at least 2, and one more while the result is looked at. With as many as weights in the window it is
            exact; with 5 of them ``linear`` is within 0.125 of it in the sum of absolute differences between merge
            weights, ``exponential`` 0.174, ``cosine`` 0.201, ``1-sqrt`` 0.459 (``rules.SlidingAnnealedMean``).
        tokens: A function of a training batch that says how many tokens, samples, or whatever counts, it is for all
            processes together, the same number in each. ``window`` is then a number of those, and the decay falls with
            them. Needs ``memory``; every shape works.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        selection: Which tensors are averaged and what happens to buffers; by default all parameters, and
            BatchNorm statistics are measured again under the mean.
        optimizer: Index of the optimizer whose steps are counted.
        options: ``device``, ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``RuleOptions``.

    Raises:
        ValueError: If an argument is out of its range; at fit start if the window is longer than what is left of the
            run, or the run's length is not known (with ``memory`` and a window in steps it need not be).

    Example:
        >>> Anneal("1-sqrt", window="10%", every_n_steps=50).name
        'anneal'

    References:
        Tian et al., "WSM: decay-free learning rate schedule via checkpoint merging for LLM pre-training", ICLR 2026.
        Hägele et al., "Scaling laws and compute-optimal training beyond fixed training durations", NeurIPS 2024.
    """

    def __init__(
        self,
        shape: Decay = "linear",
        window: float | str | Duration = "20%",
        every_n_steps: int = 1,
        memory: int | None = None,
        tokens: Callable[[Any], int] | None = None,
        validate: Validate = "merged",
        name: str = "anneal",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        window = Duration.parse(window, "window")
        self.tokens = None if tokens is None else function("tokens", tokens)
        if tokens is not None:
            refuse_tokens(window, memory)
        self._passed = 0  # tokens since the last update, that the rule has not been told
        schedule: Schedule
        if memory is None:
            rule: Rule = AnnealedMean(shape, window, every_n_steps)
            schedule = BeforeEnd(window, every_n_steps)
        else:
            rule = SlidingAnnealedMean(shape, window, 1 if tokens else every_n_steps, memory)
            schedule = EveryNSteps(every_n_steps)
        super().__init__(
            rule,
            schedule=schedule,
            selection=chosen(selection, Selection(buffers="recompute")),
            validate=validate,
            name=name,
            optimizer=optimizer,
            **known(options, RuleOptions, self),
        )

    # ---- tokens

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Counts what is in the batch."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if self.tokens is not None:
            self._passed += whole(f"what `tokens` of {self.title} gives", self.tokens(batch), 0)

    def take_in(self, moment: Moment, finding: Finding) -> None:
        """Tells the rule what has passed, and takes the weights in."""
        self._tell()
        super().take_in(moment, finding)

    def save(self) -> dict[str, Any]:
        """As any average, and what has passed since the last update."""
        self._tell()
        return super().save()

    def progress(self) -> dict[str, Any]:
        """Counters that have to be the same in every process."""
        state = self._state or {}
        held = [block["count"] for block in state.get("blocks", ())]
        counted = {f"the tokens that {self.title} counts": [*held, state.get("passed", 0) + self._passed]}
        return {**super().progress(), **(counted if self.tokens is not None else {})}

    def _tell(self) -> None:
        rule = self._active_rule
        if self.tokens is not None and self._state is not None:
            assert isinstance(rule, SlidingAnnealedMean)
            rule.advance(self._state, self._passed)
            self._passed = 0

    # ---- the window

    def _resolved(self, trainer: Trainer) -> tuple[Rule, Schedule]:
        """Those of the run; a few steps of ``fast_dev_run`` are the window, if that is longer, so that it is tried."""
        run = planned_length(trainer) if trainer.fast_dev_run else RunLength()  # type: ignore[attr-defined]  # set outside the class
        if run.steps and self.tokens is None:
            rule = self.rule
            assert isinstance(rule, AnnealedMean | SlidingAnnealedMean)
            window = Duration.parse(rule.window)
            if not rule.steps_per_update <= window.steps(run) <= run.steps:
                rank_zero_info(
                    f"{self.title}: its `window` has no room in this `fast_dev_run`, whose {run.steps} steps it takes."
                )
                return replace(rule, window=Duration(run.steps), steps_per_update=1), EveryNSteps()
        return super()._resolved(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Counts steps from the start of the run, and sees that the window lies before its end."""
        if not self._resumed:
            self.steps = trainer.global_step  # also where the run goes on from a file without this average
        else:
            self._passed = 0  # the rest is in the file
        self._check_window(trainer)
        super().on_train_start(trainer, pl_module)

    def _check_window(self, trainer: Trainer) -> None:
        rule, schedule, state = self._active_rule, self._active_schedule, self._state
        assert isinstance(rule, AnnealedMean | SlidingAnnealedMean)
        assert isinstance(schedule, EveryNSteps)
        length = rule.snapshots * rule.steps_per_update
        if isinstance(rule, SlidingAnnealedMean):
            end = planned_length(trainer).steps
            begun = state is not None and bool(state["blocks"])
            late = self.tokens is None and not begun and end is not None and self.steps + length > end
        else:
            end = int(schedule.start) + length
            passed = max(0, self.steps - int(schedule.start)) // rule.steps_per_update
            if state is not None and state["taken"] > passed:
                rank_zero_info(f"{self.title}: the run ends later than it did, and a window begins anew.")
                state["taken"] = 0
            if state is not None and state["taken"]:
                refuse_another_plan(self.title, rule, state)
            late = passed > (state["taken"] if state else 0) + self.skipped_nonfinite
        if late:
            raise too_long(self.title, length, end, self.steps)

    def _look_up(self) -> None:
        """Copies for a window of a number of weights are of no use for another one."""
        rule, given, state = self._active_rule, self.rule, self._state
        if isinstance(rule, SlidingAnnealedMean) and state is not None and state["blocks"]:
            assert isinstance(given, SlidingAnnealedMean)
            began, is_of_steps = rule.began_as(state), Duration.parse(given.window).unit == "steps"
            if began[1] != rule.snapshots and not is_of_steps and [*began[::2]] == [*rule.plan[::2]]:
                rank_zero_info(f"{self.title}: the run is another length than it was, and a window begins anew.")
                state["blocks"].clear()
            else:
                refuse_another_plan(self.title, rule, state)
        super()._look_up()
