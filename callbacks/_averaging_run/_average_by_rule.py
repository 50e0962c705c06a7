"""What an average by a rule is: its state, what there is of it, and what a file keeps."""

import inspect
from typing import Any, Literal, Unpack

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lightning_merge import weights
from lightning_merge._averaging._elsewhere import checked_device
from lightning_merge._averaging._remarks import adopted
from lightning_merge._averaging._state import AveragingState
from lightning_merge._averaging._taking_in import TakingIn
from lightning_merge._choice import Mode
from lightning_merge.callbacks._publication._callback import Published, Validate
from lightning_merge.callbacks._publication._options import RuleOptions, known
from lightning_merge.rules import Rule
from lightning_merge.schedules import Schedule
from lightning_merge.selections import Selection
from lightning_merge.weights import Weights


class AverageByRule(TakingIn, Published):
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
        Published.__init__(self, validate, name, optimizer, **others)  # type: ignore[arg-type]
        self.device: Literal["cpu"] | None = checked_device(device)
        TakingIn.__init__(self, self.title, rule, schedule, selection, on_host=self.device is not None)
        self.decides_by = monitor
        self.monitor = monitor if rule.wants_score == "raw" else None
        self.mode: Mode = mode
        self.stop_when_finished = stop_when_finished

    def _inform(self, sentence: str) -> None:
        rank_zero_info(sentence)

    def _warn(self, sentence: str) -> None:
        rank_zero_warn(sentence)

    # ---- what there is

    @property
    def works_on_shards(self) -> bool:
        """Whether its rule does."""
        return self.rule.works_on_shards

    @property
    def decides_on_score(self) -> bool:
        """Whether its rule does."""
        return self.rule.decides_on_score

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

    def cheaper(self, n: int) -> str | None:
        known = inspect.signature(type(self)).parameters
        cadence = {"every_n_steps": f"`every_n_steps={n}`", "schedule": f"`schedule=EveryNSteps({n})`"}
        ways = [words for argument, words in cadence.items() if argument in known]
        on_device = any(not tensor.is_cpu for tensor in self.tensors.values())
        if on_device and self.device is None and self._active_rule.can_be_undone:
            ways.append("weights taken in beside the training by `device='cpu'`")
        return " or ".join(ways) or None

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
