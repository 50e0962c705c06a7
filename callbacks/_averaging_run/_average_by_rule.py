"""What an average by a rule is: its state, what there is of it, and what a file keeps."""

from typing import Any, Literal, Unpack

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_merge import weights
from lightning_merge._choice import Mode
from lightning_merge.callbacks._averaging_run._elsewhere import Background
from lightning_merge.callbacks._averaging_run._remarks import adopted
from lightning_merge.callbacks._averaging_run._state import AveragingState
from lightning_merge.callbacks._averaging_run._tensors import Tensors
from lightning_merge.callbacks._averaging_run._undecided import Decided, Undecided
from lightning_merge.callbacks._publication._callback import Published, Validate
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.rules import Rule
from lightning_merge.schedules import Schedule
from lightning_merge.selections import Selection
from lightning_merge.weights import State, Weights


class AverageByRule(Published):
    """What ``WeightMerging`` remembers: what it does with it is in ``MergingByRule``, its hooks in itself.

    Args:
        rule: How weights are merged.
        schedule: When.
        selection: Which tensors, and what becomes of buffers.
        validate: Which weights validation measures.
        name: Of the average.
        optimizer: Index of the optimizer whose applied steps are counted.
        monitor: The metric that the rule is told, if it wants one.
        mode: Whether lower or higher is better.
        stop_when_finished: Stop training once nothing more can change what the rule merges.
        options: See ``RuleOptions``.
    """

    # What an update changes, and whoever reads it wants decided.
    _state: Decided[State | None] = Decided()
    _buffers: Decided[Weights] = Decided()
    update_window: Decided[tuple[int, int] | None] = Decided()
    skipped_nonfinite: Decided[int] = Decided()
    _undecided: Undecided | None = None
    _background: Background | None = None  # of this fit, once an update was made in host memory

    def __init__(
        self,
        rule: Rule,
        schedule: Schedule,
        selection: Selection,
        validate: Validate,
        name: str,
        optimizer: int,
        monitor: str | None,
        mode: Mode,
        stop_when_finished: bool,
        **options: Unpack[RuleOptions],
    ) -> None:
        device, others = options.get("device"), dict(known(options, RuleOptions, self))
        others.pop("device", None)
        super().__init__(validate, name, optimizer, **others)  # type: ignore[arg-type]
        if device not in (None, "cpu"):
            raise ValueError(f"`device` must be None (where the weights are) or 'cpu' (host memory), got {device!r}.")
        self.device: Literal["cpu"] | None = device
        self.rule = rule
        self.schedule = schedule
        self.selection = selection
        self.decides_by = monitor
        self.monitor = monitor if rule.wants_score == "raw" else None
        self.mode: Mode = mode
        self.stop_when_finished = stop_when_finished

        self.skipped_nonfinite = 0
        self.evaluations = 0

        self._active_rule = rule
        self._active_schedule = schedule
        self._state = None
        self._last_epoch = 0  # epochs completed when an epoch end was last handled
        self._tensors = Tensors(self.title, selection, on_host=device is not None)

    def decide(self) -> None:
        """Reads whether the weights of the last update were fit for it, and takes it back if they were not."""
        if self._background is not None and self._background.is_busy:
            if self._background.is_here:
                return
            self._background.finish()
        undecided, self._undecided = self._undecided, None
        if undecided is None or not (culprits := undecided.finding.names() & undecided.names):
            return
        self._state, self._buffers, self.update_window = undecided.state, undecided.buffers, undecided.window
        self._skip(min(culprits), undecided.step)

    def _skip(self, culprit: str, step: int) -> None:
        self.skipped_nonfinite += 1
        if self.skipped_nonfinite == 1:
            rank_zero_warn(
                f"{self.title}: `{culprit}` holds a NaN or an infinity after applied step {step}. Such weights"
                " are never merged; the last good average is kept, and `skipped_nonfinite` counts how often. Lower the"
                " learning rate or clip gradients."
            )

    @property
    def _kept(self) -> State:
        """The state of the rule, once it has begun."""
        if self._state is None:
            raise RuntimeError(f"{self.title} has merged nothing yet.")
        return self._state

    # ---- what there is

    @property
    def updates(self) -> int:
        """Times that weights were taken in."""
        return int(self._state["updates"]) if self._state else 0

    @property
    def works_on_shards(self) -> bool:
        """Whether its rule does."""
        return self.rule.works_on_shards

    @property
    def decides_on_score(self) -> bool:
        """Whether its rule does."""
        return self.rule.decides_on_score

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the merged weights do."""
        return self.updates, self.evaluations

    @property
    def initial_share(self) -> float:
        """Share of the merged weights that is still the weights of the start, in [0, 1]."""
        return self._active_rule.initial_share(self._state) if self._state else 0.0

    @property
    def ready(self) -> bool:
        """Whether there is something to publish."""
        return self._state is not None and self._active_rule.stored(self._state) is not None

    def merged(self) -> Weights | None:
        result = self._active_rule.stored(self._state) if self._state else None
        if result is None:
            return None
        averaged = self._tensors.averaged
        if gone := averaged and result.keys() - averaged.keys():  # a window on disk has them still
            result = {name: tensor for name, tensor in result.items() if name not in gone}
        return {**result, **self._buffers}

    @property
    def left_alone(self) -> list[str]:
        return [] if self._publisher is None else self.selection.left_alone(self._publisher.inventory)

    def configuration(self) -> dict[str, Any]:
        fields = ("rule", "schedule", "selection", "stop_when_finished")
        ours = {f"`{field}` of {self.title}": repr(getattr(self, field)) for field in fields}
        return {**ours, **super().configuration()}

    def progress(self) -> dict[str, Any]:
        left_out = {f"how often {self.title} left out weights with a NaN": self.skipped_nonfinite}
        return {**super().progress(), **left_out}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live parameters and buffers that it merges, by canonical name; of sharded ones the part that is here."""
        return {**self._tensors.live, **self._tensors.live_copied}

    @property
    def checked(self) -> dict[str, Tensor]:
        return self._tensors.checked

    @property
    def watches_training(self) -> bool:
        return self.selection.trainable

    @property
    def captured(self) -> dict[str, Tensor]:
        return {**self._tensors.averaged, **self._tensors.copied}

    def describe(self) -> str:
        """What is merged and what it takes, in a few words."""
        numbers = sum(tensor.numel() for tensor in self._tensors.live.values())
        size = sum(t.numel() * weights.average_dtype(t).itemsize for t in self._tensors.live.values())
        where = ", in this process" if self.is_sharded else ""
        where += ", in host memory" if self._tensors.is_elsewhere else ""
        return (
            f"{numbers:,} numbers in {len(self._tensors.live)} tensors ({size / 1e6:,.1f} MB a copy{where}), buffers:"
            f" {self.selection.buffers}"
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.rule!r}, {self.schedule!r}, {self.selection!r}, name={self.name!r})"

    # ---- for the publisher

    def label(self) -> dict[str, Any]:
        """What every file says about this average."""
        return {"class": type(self).__name__, "rule": repr(self.rule), "steps": self.steps, "updates": self.updates}

    def save(self) -> dict[str, Any]:
        return AveragingState(
            state=None if self._state is None else self._active_rule.save(self._state),
            evaluations=self.evaluations,
            buffers=self._buffers,
            calibrated_at=self._calibrated_at,
            recent=None if self._recent is None else self._recent.saved(),
            last_epoch=self._last_epoch,
            update_window=None if self.update_window is None else list(self.update_window),
            skipped_nonfinite=self.skipped_nonfinite,
        ).section()

    def adopt(self, average: Weights, updates: int, steps: int, epochs: int) -> bool:
        """See ``Average``: rules that keep an average and counts can."""
        inventory = self._session.inventory
        live = self.selection.parameters(inventory).keys() | self.selection.averaged_buffers(inventory).keys()
        state = adopted(self.rule, {name: tensor for name, tensor in average.items() if name in live}, updates)
        if state is None:
            return False
        self._state = state
        self._buffers = weights.copies({name: average[name] for name in self.selection.copied_buffers(inventory)})
        self.steps, self._last_epoch, self._resumed = steps, epochs, True
        return True

    def synchronise(self, different: list[str]) -> None:
        """What rules keep of weights are sums of them, so the mean of their states is the state of the mean."""
        kept: Weights = {}

        def collect(name: str | None, tensor: Tensor) -> Tensor:
            if not weights.is_sharded(self._tensors.averaged.get(str(name), tensor)):
                kept[f"{len(kept):09d}"] = tensor
            return tensor

        weights.map_named(collect, self._state)
        weights.mean_over_ranks_(kept)

    def to_host(self) -> None:
        """Follows the module to host memory after a fit, so no accelerator memory stays taken."""
        host = torch.device("cpu")
        self.decide()
        if self._background is not None:
            self._background.close()
            self._background = None
        if self._state is not None:
            self._state = self._active_rule.load(self._state, dict.fromkeys(self.tensors, host))
        self._buffers = weights.to_devices(self._buffers, host)
