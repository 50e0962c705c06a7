"""Anneal: what a learning rate that decays would have given, as a mean of the weights at a constant one."""

from dataclasses import replace
from typing import Unpack

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge._checks import whole
from lightning_merge.callbacks._lightning._run import planned_length
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.callbacks._weight_merging import Validate, WeightMerging
from lightning_merge.rules import AnnealedMean, Rule, SlidingAnnealedMean
from lightning_merge.rules._decaying import Decaying
from lightning_merge.schedules import BeforeEnd, Duration, EveryNSteps, RunLength, Schedule
from lightning_merge.schedules._decay import Decay
from lightning_merge.selections import Selection, chosen
from lightning_merge.weights import State


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
        validate: Validate = "merged",
        name: str = "anneal",
        *,
        selection: Selection | None = None,
        optimizer: int = 0,
        **options: Unpack[RuleOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        window = Duration.parse(window, "window")
        schedule: Schedule
        if memory is None:
            rule: Rule = AnnealedMean(shape, window, every_n_steps)
            schedule = BeforeEnd(window, every_n_steps)
        else:
            rule = SlidingAnnealedMean(shape, window, every_n_steps, memory)
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

    def _resolved(self, trainer: Trainer) -> tuple[Rule, Schedule]:
        """Those of the run; a few steps of ``fast_dev_run`` are the window, if that is longer, so that it is tried."""
        run = planned_length(trainer) if trainer.fast_dev_run else RunLength()  # type: ignore[attr-defined]  # set outside the class
        if run.steps:
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
            late = not begun and end is not None and self.steps + length > end
        else:
            end = int(schedule.start) + length
            passed = max(0, self.steps - int(schedule.start)) // rule.steps_per_update
            if state is not None and state["taken"] > passed:
                rank_zero_info(f"{self.title}: the run ends later than it did, and a window begins anew.")
                state["taken"] = 0
            if state is not None and state["taken"]:
                self._refuse_another_plan(rule, state)
            late = passed > (state["taken"] if state else 0) + self.skipped_nonfinite
        if late:
            raise ValueError(
                f"{self.title}: `window` must be at most what is left of the run, {end} steps of which {self.steps} are"
                f" done, got {length} steps. Give a shorter one, or go on from an earlier checkpoint."
            )

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
                self._refuse_another_plan(rule, state)
        super()._look_up()

    def _refuse_another_plan(self, rule: Decaying, state: State) -> None:
        if (began := rule.began_as(state)) != rule.plan:
            was, now = (f" in {plan[2]} copies" if len(plan) > 2 else "" for plan in (began, rule.plan))
            raise ValueError(
                f"{self.title}: the window of the file began with `shape` {began[0]!r} and {began[1]} weights{was}, and"
                f" now `shape` is {rule.shape!r} and the window has {rule.snapshots}{now}: the weights of one decay"
                " are no merge of another. Give what was given then, or go on from a checkpoint before the window, or"
                " give this one another `name`, with which it starts empty."
            )
