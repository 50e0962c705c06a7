"""What a rule is."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, NoReturn

import torch
from torch import Tensor

from lightning_merge.schedules import RunLength
from lightning_merge.weights import State, Weights, copies, to_devices


class Rule(ABC):
    """How the weights of one run are merged, as three functions over a state that the caller owns.

    A rule is a frozen dataclass of hyperparameters. All it remembers is the state it is handed, so saving the state
    saves everything. Weights are float tensors under canonical names; a rule never writes to them. An entry ``cache``
    of a state is what can be computed again: it is not saved.
    """

    decides_on_score: ClassVar[bool] = False
    """Whether what it merges depends on the scores of the raw weights, so that ``evaluate`` has to be called."""

    wants_score: ClassVar[Literal["raw", "own"] | None] = None
    """Whose score ``evaluate`` is told after each validation: that of the raw weights, or of its own result."""

    merges_when_scored: ClassVar[bool] = False
    """Whether it takes the weights in that ``evaluate`` hands it with their score, rather than at steps."""

    callback: ClassVar[str] = "WeightMerging"
    """The callback of ``lightning_merge.callbacks`` that uses this rule."""

    start_is_meant: ClassVar[bool] = False
    """Whether the weights of the start are part of the result on purpose, so that nobody needs to be told."""

    @property
    def state_dict(self) -> NoReturn:
        """A Trainer asks this of its callbacks first, so a rule in their place says what belongs there."""
        name = type(self).__name__
        raise TypeError(
            f"{name} is a rule, and a Trainer takes callbacks: use {self.callback} of lightning_merge.callbacks, or"
            f" WeightMerging({name}(...), ...)."
        )

    @abstractmethod
    def init(self, weights: Weights) -> State:
        """The state before the first update. Copies what it keeps.

        Args:
            weights: Tensors by canonical name; not changed.
        """

    @abstractmethod
    def update(self, state: State, weights: Weights) -> None:
        """Takes the weights into the state, in place.

        Args:
            state: What ``init`` gave and ``update`` went on with; changed in place.
            weights: Tensors by canonical name, as ``init`` was given; not changed.
        """

    def result(self, state: State) -> Weights | None:
        """The merged weights in tensors of their own, or ``None`` if there are none yet.

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        stored = self.stored(state)
        return None if stored is None else copies(stored)

    def stored(self, state: State) -> Weights | None:
        """The same without a copy: maybe the state's own tensors, to be read at once and not written to.

        A rule defines this, or ``result``.

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        if type(self).result is Rule.result:
            raise NotImplementedError(f"{type(self).__name__} must define `result`, or `stored`.")
        return self.result(state)

    def evaluate(self, state: State, score: float, weights: Weights | None = None) -> None:
        """Takes in a score that was just measured, lower is better; only rules that want one do anything.

        Args:
            state: What it remembers.
            score: Of the raw weights or of its result, as ``wants_score`` says.
            weights: The raw weights at that moment.
        """
        return

    def finished(self, state: State) -> bool:
        """Whether nothing can change the result any more, so that training may stop.

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        return False

    def conclude(self, state: State) -> str | None:
        """Called once after the last step: settles what is published if nothing was merged so far.

        Returns one sentence about what happened, or ``None``.

        Args:
            state: What ``init`` gave and ``update`` went on with; may be changed in place.
        """
        return None

    def resolve(self, run: RunLength) -> "Rule":
        """This rule with everything that was given relative to the run turned into steps.

        Args:
            run: How long the run is, as far as that is known.
        """
        return self

    @property
    def keeps_files(self) -> bool:
        """Whether a state names files that it writes and removes, so that several processes cannot go on from one."""
        return False

    @property
    def can_be_undone(self) -> bool:
        """Whether ``update`` writes to tensors of its state by the functions of ``lightning_merge.weights`` alone.

        It can then be called before it is known whether the weights hold a NaN, and undone if they do; otherwise the
        device is waited for at each update. It must do nothing outside of the state either, as writing a file, and read
        no tensor that ``lerp_`` has written to in the same update: that may wait for the updates of other averages.
        """
        return False

    @property
    def result_is_near(self) -> bool:
        """Whether the result lies on the devices of the weights, and takes a few passes over them at most."""
        return True

    @property
    def works_on_shards(self) -> bool:
        """Whether it may be handed parts of tensors, in each process its own."""
        return True

    def initial_share(self, state: State) -> float:
        """Share of the result that is still the weights of the start, in [0, 1].

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        return 0.0

    def last_decay(self, state: State) -> float | None:
        """Share of the average that the last update kept, in ``[0, 1)``; ``None`` if the rule has no decay.

        Args:
            state: What ``init`` gave and ``update`` went on with, at least once.
        """
        return None

    def shares(self, state: State) -> Tensor | None:
        """How much the weights of each update count in the result, oldest first: float64 of shape ``(updates,)``.

        ``None`` if there is no result or the state does not say. With ``initial_share``, and what a file adds, they sum
        to 1. They suppose that the rule was the same from the start.

        Args:
            state: What ``init`` gave and ``update`` went on with.
        """
        return None

    def extend(self, state: State, weights: Weights) -> None:
        """Adds tensors that have not changed since the start (parameters that are unfrozen later).

        Args:
            state: What ``init`` gave and ``update`` went on with; changed in place.
            weights: Tensors by canonical name, none of which it has.
        """
        for key, fresh in self.init(weights).items():
            if isinstance(fresh, dict):
                state[key].update(fresh)

    def forget(self, state: State, names: Iterable[str]) -> None:
        """Removes tensors of these names, which are not merged any more.

        Args:
            state: What ``init`` gave and ``update`` went on with; changed in place.
            names: Canonical names; those that it has not are passed over.
        """
        state.pop("cache", None)
        _remove(state, set(names))

    def save(self, state: State) -> State:
        """What a checkpoint holds of the state. Called for every checkpoint that the run may be resumed from.

        Args:
            state: What ``init`` gave and ``update`` went on with; not changed.
        """
        return {key: value for key, value in state.items() if key != "cache"}

    def load(self, saved: State, devices: Mapping[str, torch.device]) -> State:
        """The state to go on with, from what ``save`` gave or from a state; each tensor where the rule wants it.

        Args:
            saved: Tensors may be on any device.
            devices: Where the weights are, by name.
        """
        state: Any = to_devices({key: value for key, value in saved.items() if key != "cache"}, devices)
        return dict(state)


def _remove(nested: Any, names: set[str]) -> None:
    if isinstance(nested, dict):
        for name in [name for name, value in nested.items() if name in names and isinstance(value, Tensor)]:
            del nested[name]
    for value in nested.values() if isinstance(nested, dict) else nested if isinstance(nested, list) else ():
        _remove(value, names)
