"""What an average by a rule is: its state, and what there is of it."""

import logging
import warnings

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_merge import weights
from lightning_merge._averaging._elsewhere import Background
from lightning_merge._averaging._tensors import Tensors
from lightning_merge._averaging._undecided import Decided, Undecided
from lightning_merge._ranks import is_first, several
from lightning_merge.rules import Rule
from lightning_merge.schedules import Schedule
from lightning_merge.selections import Selection
from lightning_merge.weights import State, Weights

_LOGGER = logging.getLogger("lightning_merge")


class RuleAverage:
    """The state of a rule, the copied buffers beside it, and which live tensors they are of.

    Args:
        title: What messages call it.
        rule: How weights are merged.
        schedule: When.
        selection: Which tensors, and what becomes of buffers.
        on_host: Whether the average is to be in host memory.
    """

    # What an update changes, and whoever reads it wants decided.
    _state: Decided[State | None] = Decided()
    _buffers: Decided[Weights] = Decided()
    update_window: Decided[tuple[int, int] | None] = Decided()
    skipped_nonfinite: Decided[int] = Decided()
    _undecided: Undecided | None = None
    _background: Background | None = None  # of this fit, once an update was made in host memory
    _health_before: dict[str, float] = {}  # noqa: RUF012 (the update that is under way there; replaced, not changed)
    steps: int

    def __init__(self, title: str, rule: Rule, schedule: Schedule, selection: Selection, on_host: bool) -> None:
        self.rule = rule
        self.schedule = schedule
        self.selection = selection
        self.steps = 0
        self.update_window = None
        self.skipped_nonfinite = 0
        self.evaluations = 0
        self._active_rule = rule
        self._active_schedule = schedule
        self._state = None
        self._buffers = {}
        self._last_epoch = 0  # epochs completed when an epoch end was last handled
        self._tensors = Tensors(title, selection, on_host, self._inform)

    def _inform(self, sentence: str) -> None:
        """Says something once, not from each process."""
        if is_first():
            _LOGGER.info(sentence)

    def _warn(self, sentence: str) -> None:
        if is_first():
            warnings.warn(sentence, stacklevel=2)

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
            self._warn(
                f"{self._tensors.title}: `{culprit}` holds a NaN or an infinity after applied step {step}. Such weights"
                " are never merged; the last good average is kept, and `skipped_nonfinite` counts how often. Lower the"
                " learning rate or clip gradients."
            )

    @property
    def _kept(self) -> State:
        """The state of the rule, once it has begun."""
        state = self._state
        if state is None:
            raise RuntimeError(f"{self._tensors.title} has merged nothing yet.")
        return state

    def _refuse_files_of_several(self) -> None:
        if self.rule.keeps_files and several():
            raise ValueError(
                f"{self._tensors.title} keeps weights in files, and only one process can go on from those, got"
                f" {dist.get_world_size()}. Use host memory, where each process keeps its part of sharded parameters:"
                " `store='cpu'`, or no `directory`."
            )

    # ---- what there is

    @property
    def updates(self) -> int:
        """Times that weights were taken in."""
        return int(self._state["updates"]) if self._state else 0

    @property
    def version(self) -> tuple[int, int]:
        """Changes whenever the merged weights do."""
        return self.updates, self.evaluations

    @property
    def initial_share(self) -> float:
        """Share of the merged weights that is still the weights of the start, in [0, 1]."""
        return self._active_rule.initial_share(self._state) if self._state else 0.0

    def health(self) -> dict[str, float]:
        """``updates``, ``start_share`` and, where the rule has one, ``decay``; empty before the first update.

        In host memory that is before the update that may be under way, so that nothing waits for it.
        """
        if self._background is not None and self._background.is_busy:
            return self._health_before
        return self._health()

    def _health(self) -> dict[str, float]:
        state = self._state
        if not state or not state["updates"]:
            return {}
        decay = self._active_rule.last_decay(state)
        found: dict[str, float] = {"updates": self.updates, "start_share": self.initial_share}
        return found if decay is None else {**found, "decay": decay}

    def at_hand(self) -> Weights | None:
        """As ``merged``, if that lies on the devices of the live tensors and is made in a few passes over them."""
        if self._tensors.is_elsewhere or not self._active_rule.result_is_near or (state := self._state) is None:
            return None
        was_made = "cache" in state
        merged = self.merged()
        if not was_made:
            state.pop("cache", None)  # a copy that nobody else has asked for
        return merged

    def shares(self) -> Tensor | None:
        """How much the weights of each update count in the merged ones, oldest first; ``None`` if that is not known."""
        return self._active_rule.shares(self._state) if self._state else None

    @property
    def ready(self) -> bool:
        """Whether there is something to publish."""
        return self._state is not None and self._active_rule.stored(self._state) is not None

    def merged(self) -> Weights | None:
        """The merged parameters and buffers, each once by the first of its names; ``None`` if there are none.

        They are the stored tensors, in the average's precision. Of sharded ones it is the part that is here.
        """
        result = self._active_rule.stored(self._state) if self._state else None
        if result is None:
            return None
        averaged = self._tensors.averaged
        if gone := averaged and result.keys() - averaged.keys():  # a window on disk has them still
            result = {name: tensor for name, tensor in result.items() if name not in gone}
        return {**result, **self._buffers}

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The live parameters and buffers that it merges, by canonical name; of sharded ones the part that is here."""
        return {**self._tensors.live, **self._tensors.live_copied}

    @property
    def captured(self) -> dict[str, Tensor]:
        """The same as the module has them: sharded ones as they are."""
        return {**self._tensors.averaged, **self._tensors.copied}

    @property
    def checked(self) -> dict[str, Tensor]:
        """Those of ``tensors`` in which a NaN or an infinity keeps the weights from being merged."""
        return self._tensors.checked

    @property
    def watches_training(self) -> bool:
        """Whether what it merges depends on which parameters require gradients."""
        return self.selection.trainable

    def to_host(self) -> None:
        """Follows the module to host memory, so no accelerator memory stays taken."""
        host = torch.device("cpu")
        try:
            self.decide()
        finally:
            if self._background is not None:
                self._background.close()
                self._background = None
        if self._state is not None:
            self._state = self._active_rule.load(self._state, dict.fromkeys(self.tensors, host))
        self._buffers = weights.to_devices(self._buffers, host)
