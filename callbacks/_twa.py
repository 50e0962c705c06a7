"""TWA: trainable weight averaging, whose coefficients are trained in a last stage of the same fit."""

import os
from typing import Any, Literal, Unpack

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_merge import weights
from lightning_merge._checks import number, one_of, path
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._publication._callback import Published, Validate
from lightning_merge.callbacks._publication._options import AverageOptions, known
from lightning_merge.callbacks._publication._session import Publisher
from lightning_merge.callbacks._twa_run._fit import Fit
from lightning_merge.callbacks._twa_run._plan import Plan, plan_of_given, plan_of_run, quick_plan
from lightning_merge.callbacks._twa_run._saved import Counts, TWASaved
from lightning_merge.optim import Subspace
from lightning_merge.optim._subspace import Form, Store, check_settings
from lightning_merge.schedules import Duration, Moment
from lightning_merge.selections import Selection, chosen
from lightning_merge.trajectory import Trajectory
from lightning_merge.weights import State, Weights


class TWA(Published):
    """Trainable weight averaging: collects snapshots, then trains their coefficients instead of all weights.

    The run has two stages. In the first it trains as ever, and the weights are copied at a cadence. The second begins
    at the mean of the copies and moves in their span only: forward and backward pass, data, and gradient clipping stay
    those of the run, and the optimizer's step is replaced by one of ``n`` numbers (``lightning_merge.optim.Subspace``).
    The weights of the second stage are what is measured and saved; before it, everything is as without the callback.

    The learning rate of the second stage is its own; the module's scheduler keeps stepping and sets nothing.

    Args:
        every: Training between snapshots: a number of optimizer steps, ``"500 steps"``, ``"1 epochs"``, or ``"2%"``.
        stage: Length of the second stage, at the end of the run; likewise.
        start: Applied steps before the first interval begins, likewise; ``0`` for none.
        lr: Learning rate on coefficients of orthonormal directions, so on the scale of plain SGD's; more than 0.
        schedule: ``"linear"`` lets it fall to 0 over the second stage, ``"constant"`` keeps it.
        inner: What works on the coefficients, ``"sgd"`` or ``"adamw"``.
        momentum: Of SGD, in [0, 1).
        weight_decay: At least 0; pulls to the mean of the snapshots (``form="iclr"``: to 0).
        form: ``"centred"``, ``"iclr"`` or ``"journal"``, see ``Subspace``.
        store: Where the snapshots are, ``"device"`` or ``"cpu"``. There are ``n`` copies of the weights.
        checkpoints: A run's folder or a ``Trajectory``: its checkpoints are the snapshots, and the whole fit is the
            second stage. ``every``, ``stage``, and ``start`` do not count then.
        validate: Which weights validation measures, ``"merged"``, ``"raw"`` or ``"both"``. In the second stage these
            are the same parameters; BatchNorm statistics are measured again for the merged ones.
        name: Prefix of its metrics when it is not the first average, and of its files.
        selection: Which parameters; by default all that are trained. What becomes of buffers.
        options: ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``AverageOptions``.

    Attributes:
        snapshots: How many weights were collected.
        coefficients: The weight of each snapshot in the merged weights; a list per tensor with ``form="journal"``.
        skipped_nonfinite: Snapshots and steps left out because of a NaN or an infinity.

    Raises:
        ValueError: If an argument is out of range; at fit start if the run is too short for two snapshots and a stage,
            its length is not known, or it has several optimizers; when the stage begins if all snapshots are equal.
        MemoryError: At fit start if the snapshots do not fit.

    Example:
        >>> TWA(every="1 epochs", stage="10%").name
        'twa'

    References:
        Li et al., "Trainable weight averaging: efficient training by optimizing historical solutions", ICLR 2023.
    """

    def __init__(
        self,
        every: int | float | str = "1 epochs",
        stage: int | float | str = "10%",
        start: int | float | str = 0,
        lr: float = 0.5,
        schedule: Literal["linear", "constant"] = "linear",
        inner: Literal["sgd", "adamw"] = "sgd",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        form: Form = "centred",
        store: Store = "device",
        checkpoints: "str | os.PathLike[str] | Trajectory | None" = None,
        validate: Validate = "merged",
        name: str = "twa",
        *,
        selection: Selection | None = None,
        **options: Unpack[AverageOptions],
    ) -> None:
        super().__init__(validate, name, optimizer=0, **known(options, AverageOptions, self))
        momentum, weight_decay = check_settings(form, store, inner, momentum, weight_decay, "inner")
        one_of("schedule", schedule, ("linear", "constant"))
        self.every = Duration.parse(every, "every")
        self.stage = Duration.parse(stage, "stage")
        none = not isinstance(start, str | bool) and not getattr(start, "ndim", 0) and start == 0
        self.start = None if none else Duration.parse(start, "start")
        self.lr = number("lr", lr, "(0, inf)")
        self.schedule = schedule
        self.inner = inner
        self.momentum = momentum
        self.weight_decay = weight_decay
        self.form = form
        self.store = store
        if checkpoints is not None and not isinstance(checkpoints, Trajectory):
            checkpoints = path("checkpoints", checkpoints)
        self.checkpoints = checkpoints
        self.selection = chosen(selection, Selection(buffers="recompute"))

        self._counts = Counts()
        self._fit: Fit | None = None
        self._saved: State | None = None  # the subspace of a checkpoint, until the fit starts

    def __repr__(self) -> str:
        return (
            f"TWA(every={self.every!r}, stage={self.stage!r}, lr={self.lr}, schedule={self.schedule!r},"
            f" inner={self.inner!r}, momentum={self.momentum}, weight_decay={self.weight_decay}, form={self.form!r},"
            f" name={self.name!r})"
        )

    # ---- what there is

    @property
    def snapshots(self) -> int:
        """Weights that were collected."""
        return 0 if self._fit is None else self._fit.subspace.count

    @property
    def coefficients(self) -> list[Any] | None:
        """The weight of each snapshot in the merged weights; a list per tensor with ``form="journal"``."""
        return self._fit.subspace.coefficients.tolist() if self._fit is not None and self.ready else None

    @property
    def skipped_nonfinite(self) -> int:
        """Snapshots and steps left out because of a NaN or an infinity."""
        return self._counts.skipped

    @property
    def updates(self) -> int:
        """Steps of the second stage."""
        return self._counts.stage_steps

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the merged weights do."""
        return self._counts.stage_steps, int(self.ready)

    @property
    def ready(self) -> bool:
        """Whether the second stage has begun."""
        return self._fit is not None and self._fit.subspace.begun

    def merged(self) -> Weights | None:
        """The weights of the second stage; ``None`` before it."""
        if self._fit is None or not self.ready:
            return None
        raw = self._fit.publisher.raw(self)
        return {**{name: raw[name] for name in self._fit.live}, **self._buffers}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live parameters that it trains, and the buffers."""
        return {} if self._fit is None else self._fit.tensors

    @property
    def _running(self) -> Fit:
        if self._fit is None:
            raise RuntimeError(f"{self.title} has not been part of a fit yet, so it has no snapshots.")
        return self._fit

    def describe(self) -> str:
        """How many snapshots of what, and when."""
        fit = self._running
        numbers = sum(tensor.numel() for tensor in fit.live.values())
        size = sum(t.numel() * weights.average_dtype(t).itemsize for t in fit.live.values())
        copies = max(fit.plan.snapshots, self.snapshots)
        return (
            f"{copies} snapshots of {numbers:,} numbers ({copies * size / 1e6:,.1f} MB), whose coefficients it trains"
            f" from step {fit.plan.stage_start} to {fit.plan.end}; buffers: {self.selection.buffers}"
        )

    @property
    def shared(self) -> Weights:
        """Parameters that are frozen or not selected."""
        return {} if self._fit is None else self._fit.shared_parameters

    # ---- a fit begins

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the two stages, and makes room for the snapshots."""
        super().on_fit_start(trainer, pl_module)
        publisher = Publisher.attach(trainer, pl_module)
        if len(trainer.optimizers) != 1 or isinstance(trainer.optimizers[0], LBFGS):
            kinds = ", ".join(type(each).__name__ for each in trainer.optimizers)
            raise ValueError(f"{self.title} replaces the steps of one optimizer other than LBFGS, got {kinds}.")
        trajectory = self._trajectory()
        plan = self._plan(trainer, trajectory)
        publisher.look()
        goes_on = self._fit is not None
        fit = Fit(self.title, publisher, self.selection, plan, self._room, self._counts, self._fit)
        if self.selection.buffers == "recompute":
            self._keep_recent_batches()
        if self._saved is not None:
            fit.subspace.load(self._saved)
            self._saved = None
        self._fit = fit
        if trajectory is not None and not self.snapshots:
            fit.collect_from(trajectory)
        if goes_on and not self._resumed:
            publisher.continue_fit(self)
        publisher.begin(self, trainer.optimizers[0])
        if self.ready:
            fit.take_over(self._train)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """With given checkpoints the second stage begins here."""
        super().on_train_start(trainer, pl_module)
        if self.checkpoints is not None and not self.ready:
            self._begin()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Copies the batch, before the step can change it, for BatchNorm statistics."""
        if self._recent is not None and self.ready:
            self._recent.hold(batch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Keeps the batch now that it was trained on."""
        if self._recent is not None:
            self._recent.keep()

    def _trajectory(self) -> Trajectory | None:
        if self.checkpoints is None or isinstance(self.checkpoints, Trajectory):
            return self.checkpoints
        return Trajectory.of_run(self.checkpoints)

    def _plan(self, trainer: Trainer, trajectory: Trajectory | None) -> Plan:
        if trajectory is not None:
            return plan_of_given(self.title, trainer, len(trajectory))
        plan = plan_of_run(self.title, trainer, self.every, self.stage, self.start)
        if self.ready or self._saved is not None:
            return plan
        if trainer.fast_dev_run and plan.snapshots < 2:  # type: ignore[attr-defined]  # set outside the class
            rank_zero_info(
                f"{self.title}: its stages have no room in this `fast_dev_run`, whose first 2 steps are its snapshots."
            )
            return quick_plan(plan.end)
        plan.refuse_too_short(self.title)
        return plan

    def _room(self, live: Weights, snapshots: int) -> Subspace:
        return Subspace(live, snapshots, self.form, self.store, self.inner, self.momentum, self.weight_decay)

    @property
    def watches_training(self) -> bool:
        return True

    def look_again(self) -> None:
        """Refuses another set of parameters."""
        if self._fit is not None:
            self._fit.look_again()

    # ---- the two stages

    def wants(self, moment: Moment) -> bool:
        """Whether a snapshot is due, or the second stage."""
        plan = self._running.plan
        return not self.ready and (moment.step == plan.stage_start or plan.is_due(moment.step))

    def take_in(self, moment: Moment, finding: weights.Finding) -> None:
        """Copies the weights if that is due, and begins the second stage if it is time."""
        fit = self._running
        if fit.plan.is_due(moment.step):
            fit.collect(finding.names(), self.steps)
        if moment.step == fit.plan.stage_start:
            self._begin()

    def _begin(self) -> None:
        fit = self._running
        fit.begin(self.steps)
        self._buffers = weights.copies(fit.live_buffers)
        fit.take_over(self._train)

    def _train(self, optimizer: Optimizer) -> None:
        fit = self._running
        if fit.train(optimizer, self.steps, self.lr, self.schedule):
            self._buffers = weights.copies(fit.live_buffers)  # they may have come, gone or grown

    # ---- for the publisher

    def label(self) -> dict[str, Any]:
        """What every file says about it."""
        return {
            "class": "TWA",
            "rule": repr(self),
            "steps": self.steps,
            "updates": self.updates,
            "coefficients": self.coefficients,
        }

    def save(self) -> dict[str, Any]:
        """What a full file needs to go on bit for bit, the snapshots included."""
        return TWASaved(
            subspace=None if self._fit is None else self._fit.subspace.save(),
            stage_steps=self._counts.stage_steps,
            buffers=self._buffers,
            calibrated_at=self._calibrated_at,
            recent=None if self._recent is None else self._recent.saved(),
            skipped_nonfinite=self._counts.skipped,
        ).section()

    def load(self, saved: dict[str, Any], label: dict[str, Any]) -> None:
        """Takes over what ``save`` and ``label`` gave."""
        if label["rule"] != repr(self):
            rank_zero_warn(f"{self.title} goes on from a file that was written with {label['rule']}.")
        state = TWASaved.of(saved)
        self._fit, self._saved = None, state.subspace
        self._counts = Counts(state.stage_steps, state.skipped_nonfinite)
        self._buffers, self._calibrated_at = state.buffers, state.calibrated_at
        if state.recent is not None:
            self._recent = RecentBatches.restored(state.recent)
        self.steps = label["steps"]
        self._resumed = True

    def to_host(self) -> None:
        """Follows the module to host memory after a fit."""
        if self._fit is not None:
            self._fit.to_host()
        self._buffers = weights.to_devices(self._buffers, torch.device("cpu"))

    def note_the_end(self) -> None:
        """One line if the second stage never began."""
        if not self.ready:
            rank_zero_info(
                f"{self.title} merged nothing: its second stage was to begin at step {self._running.plan.stage_start},"
                f" and the run ended after {self.steps}. The raw weights are kept, as without the callback."
            )
