"""TWA: trainable weight averaging, whose coefficients are trained in a last stage of the same fit."""

import os
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import LBFGS, Optimizer

from lightning_merge import weights
from lightning_merge._checks import number, one_of, path
from lightning_merge.callbacks._lightning._recent_batches import RecentBatches
from lightning_merge.callbacks._lightning._run import planned_length
from lightning_merge.callbacks._publication._callback import Published, Validate
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

    Attributes:
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
    ) -> None:
        super().__init__(validate, name, optimizer=0)
        momentum, weight_decay = check_settings(form, store, inner, momentum, weight_decay, "inner")
        one_of("schedule", schedule, ("linear", "constant"))
        self.every = Duration.parse(every, "every")
        self.stage = Duration.parse(stage, "stage")
        none = not isinstance(start, str | bool) and start == 0
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
        self.skipped_nonfinite = 0

        self._interval = self._first = self._stage_start = self._end = 0  # in applied steps, known at fit start
        self._stage_steps = 0  # steps of the second stage that were taken
        self._planned = 0  # snapshots of the whole first stage
        self._subspace: Subspace | None = None
        self._saved: State | None = None  # the subspace of a checkpoint, until the fit starts
        self._live: dict[str, Tensor] = {}
        self._live_buffers: dict[str, Tensor] = {}

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
        return 0 if self._subspace is None else self._subspace.count

    @property
    def coefficients(self) -> list[Any] | None:
        """The weight of each snapshot in the merged weights; a list per tensor with ``form="journal"``."""
        return self._subspace.coefficients.tolist() if self._subspace is not None and self.ready else None

    @property
    def updates(self) -> int:
        """Steps of the second stage."""
        return self._stage_steps

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the merged weights do."""
        return self._stage_steps, int(self.ready)

    @property
    def ready(self) -> bool:
        """Whether the second stage has begun."""
        return self._subspace is not None and self._subspace.begun

    def merged(self) -> Weights | None:
        """The weights of the second stage; ``None`` before it."""
        if not self.ready:
            return None
        assert self._publisher is not None
        raw = self._publisher.raw(self)
        return {**{name: raw[name] for name in self._live}, **self._buffers}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live parameters that it trains, and the buffers."""
        return {**self._live, **self._live_buffers}

    def describe(self) -> str:
        """How many snapshots of what, and when."""
        assert self._subspace is not None
        numbers = sum(tensor.numel() for tensor in self._live.values())
        size = sum(t.numel() * weights.average_dtype(t).itemsize for t in self._live.values())
        copies = self._capacity
        return (
            f"{copies} snapshots of {numbers:,} numbers ({copies * size / 1e6:,.1f} MB), whose coefficients it trains"
            f" from step {self._stage_start} to {self._end}; buffers: {self.selection.buffers}"
        )

    # ---- a fit begins

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Plans the two stages, and makes room for the snapshots."""
        super().on_fit_start(trainer, pl_module)
        assert self._publisher is not None
        if len(trainer.optimizers) != 1 or isinstance(trainer.optimizers[0], LBFGS):
            kinds = ", ".join(type(each).__name__ for each in trainer.optimizers)
            raise ValueError(f"{self.title} replaces the steps of one optimizer other than LBFGS, got {kinds}.")
        trajectory = self._trajectory()
        self._plan(trainer, None if trajectory is None else len(trajectory))
        self._publisher.look()
        self._capture()
        if self.selection.buffers == "recompute":
            self._keep_recent_batches()
        if numbers := [name for name, parameter in self._live.items() if parameter.is_complex()]:
            raise ValueError(
                f"{self.title} trains real coefficients, and `{numbers[0]}` holds complex numbers. Leave it out:"
                f" `selection=Selection(exclude=[{numbers[0]!r}])`; EMA and SWA average it."
            )
        goes_on = self._subspace is not None
        if self._subspace is None:
            self._subspace = Subspace(
                self._live, self._capacity, self.form, self.store, self.inner, self.momentum, self.weight_decay
            )
            if self._saved is not None:
                self._subspace.load(self._saved)
                self._saved = None
        else:
            self._subspace.to_devices_of(self._live)
        if trajectory is not None and not self.snapshots:
            self._collect_from(trajectory)
        if goes_on and not self._resumed:
            self._publisher.continue_fit(self)
        self._publisher.begin(self, trainer.optimizers[0])
        if self.ready:
            self._take_over(trainer.optimizers[0])

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

    @property
    def _capacity(self) -> int:
        return max(self._planned, self.snapshots)

    def _trajectory(self) -> Trajectory | None:
        if self.checkpoints is None or isinstance(self.checkpoints, Trajectory):
            return self.checkpoints
        return Trajectory.of_run(self.checkpoints)

    def _plan(self, trainer: Trainer, given: int | None) -> None:
        run = planned_length(trainer)
        if run.steps is None:
            why = run.unknown_since or "set `max_steps` or `max_epochs`"
            raise ValueError(f"{self.title} needs a run of known length: {why}.")
        self._end = run.steps
        if given is not None:
            self._stage_start, self._planned = 0, given
            return
        self._interval = max(1, round(self.every.steps(run)))
        self._first = 0 if self.start is None else round(self.start.steps(run))
        self._stage_start = self._end - max(1, round(self.stage.steps(run)))
        self._planned = (self._stage_start - self._first) // self._interval
        if self._planned < 2 and not self.ready and self._saved is None:
            raise ValueError(
                f"{self.title} needs two snapshots or more before its second stage: `every` is {self._interval} steps,"
                f" and the stage begins at step {self._stage_start} of {self._end}, {self._stage_start - self._first}"
                " steps after `start`. Lower `every`, `start`, or `stage`."
            )

    @property
    def watches_training(self) -> bool:
        return True

    def look_again(self) -> None:
        """Refuses another set of parameters."""
        before = dict(self._live)
        if self._subspace is None or not before:
            return  # not in this fit yet
        self._capture()
        if replaced := [name for name, parameter in self._live.items() if parameter is not before[name]]:
            raise self._changed(replaced[0])

    def _capture(self) -> None:
        assert self._publisher is not None
        inventory = self._publisher.inventory
        parameters = self.selection.parameters(inventory)
        live: dict[str, Tensor] = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
        if self._live and live.keys() != self._live.keys():
            raise self._changed(min(live.keys() ^ self._live.keys()))
        self._live = live
        self._live_buffers = inventory.buffers

    def _changed(self, name: str) -> ValueError:
        return ValueError(
            f"{self.title} trains in the span of its snapshots, so the parameters that are trained must stay the same,"
            f" but `{name}` was frozen, unfrozen, or replaced."
        )

    def _collect_from(self, trajectory: Trajectory) -> None:
        assert self._module is not None
        assert self._subspace is not None
        names = weights.state_dict_names(self._module)
        for checkpoint, stored in zip(trajectory, trajectory.stream(), strict=True):
            found = {names[key]: tensor for key, tensor in stored.items() if key in names}
            needed = {name: found[name] for name in self.tensors if name in found}
            if difference := weights.first_mismatch(self.tensors, needed):
                raise ValueError(f"{checkpoint.path} is of another model than the one that is trained: {difference}.")
            self._subspace.collect(found)
        weights.copy_(self._live_buffers, found)

    # ---- the first stage

    def wants(self, moment: Moment) -> bool:
        """Whether a snapshot is due, or the second stage."""
        return not self.ready and (moment.step == self._stage_start or self._is_due(moment.step))

    def take_in(self, moment: Moment, nonfinite: set[str]) -> None:
        """Copies the weights if that is due, and begins the second stage if it is time."""
        assert self._subspace is not None
        if self._is_due(moment.step):
            if culprits := nonfinite & self._live.keys():
                self._skip(f"`{min(culprits)}` holds a NaN or an infinity after applied step {self.steps}")
            else:
                self._subspace.collect(self._live)
        if moment.step == self._stage_start:
            self._begin()

    def _is_due(self, step: int) -> bool:
        elapsed = step - self._first
        return elapsed > 0 and elapsed % self._interval == 0 and step <= self._stage_start

    def _skip(self, what: str) -> None:
        self.skipped_nonfinite += 1
        if self.skipped_nonfinite == 1:
            rank_zero_warn(f"{self.title}: {what}. It is left out; `skipped_nonfinite` counts how often.")

    # ---- the second stage

    def _begin(self) -> None:
        assert self._subspace is not None
        assert self._publisher is not None
        self._subspace.begin(self._live)
        self._buffers = weights.copies(self._live_buffers)
        self._take_over(self._publisher.trainer.optimizers[0])
        rank_zero_info(
            f"{self.title}: from step {self.steps} on, {self._subspace.rank} coefficients of {self.snapshots} snapshots"
            f" are trained, from their mean, for {self._end - self.steps} steps."
        )

    def _take_over(self, optimizer: Optimizer) -> None:
        assert self._publisher is not None
        self._publisher.patches.replace(
            optimizer, "step", lambda original, *args, **kwargs: self._step(optimizer, *args, **kwargs)
        )

    def _step(self, optimizer: Optimizer, closure: Any = None, **kwargs: Any) -> Any:
        """In the place of the optimizer's step: its hooks run as ever, its state stays as it is."""

        def step(optimizer: Optimizer) -> Any:
            result = None
            if closure is not None:
                with torch.enable_grad():
                    result = closure()
            self._train(optimizer)
            return result

        optimizer._opt_called = True  # type: ignore[attr-defined]  # what schedulers ask
        return Optimizer.profile_hook_step(step)(optimizer)

    def _train(self, optimizer: Optimizer) -> None:
        assert self._subspace is not None
        found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
        if found_inf is not None and bool(found_inf):
            return
        gradients = {name: parameter.grad for name, parameter in self._live.items()}
        if all(gradient is None for gradient in gradients.values()):
            return  # the training step asked for none
        if not self._subspace.step(self._live, gradients, self._lr(), 1.0 if scale is None else float(scale)):
            self._skip(f"the gradient holds a NaN or an infinity at applied step {self.steps + 1}")
        self._stage_steps += 1
        self._buffers = weights.copies(self._live_buffers)  # they may have come, gone or grown

    def _lr(self) -> float:
        if self.schedule == "constant":
            return self.lr
        length = self._stage_steps + self._end - self.steps
        return self.lr * max(0.0, 1.0 - self._stage_steps / length)

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
        return {
            "subspace": None if self._subspace is None else self._subspace.save(),
            "stage_steps": self._stage_steps,
            "buffers": self._buffers,
            "calibrated_at": self._calibrated_at,
            "recent": None if self._recent is None else self._recent.saved(),
            "skipped_nonfinite": self.skipped_nonfinite,
        }

    def load(self, saved: dict[str, Any], label: dict[str, Any]) -> None:
        """Takes over what ``save`` and ``label`` gave."""
        if label["rule"] != repr(self):
            rank_zero_warn(f"{self.title} goes on from a file that was written with {label['rule']}.")
        self._saved = saved["subspace"]
        self._subspace = None
        self._stage_steps = saved["stage_steps"]
        self._buffers = saved["buffers"]
        self._calibrated_at = saved["calibrated_at"]
        if saved["recent"] is not None:
            self._recent = RecentBatches.restored(saved["recent"])
        self.skipped_nonfinite = saved["skipped_nonfinite"]
        self.steps = label["steps"]
        self._resumed = True

    def to_host(self) -> None:
        """Follows the module to host memory after a fit."""
        host = torch.device("cpu")
        if self._subspace is not None:
            self._subspace.to_devices_of({name: torch.empty(0, device=host) for name in self._live})
        self._buffers = weights.to_devices(self._buffers, host)

    def note_the_end(self) -> None:
        """One line if the second stage never began."""
        if not self.ready:
            rank_zero_info(
                f"{self.title} merged nothing: its second stage was to begin at step {self._stage_start}, and the run"
                f" ended after {self.steps}. The raw weights are kept, as without the callback."
            )
