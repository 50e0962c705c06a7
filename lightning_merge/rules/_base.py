"""What a rule is."""

from abc import ABC, abstractmethod

from lightning_merge.schedules import RunLength
from lightning_merge.weights import State, Weights


class Rule(ABC):
    """How the weights of one run are merged, as three functions over a state that the caller owns.

    A rule is a frozen dataclass of hyperparameters. All it remembers is the state it is handed, so saving the state
    saves everything. Weights are float tensors under canonical names; a rule never writes to them.
    """

    @abstractmethod
    def init(self, weights: Weights) -> State:
        """The state before the first update. Copies what it keeps."""

    @abstractmethod
    def update(self, state: State, weights: Weights) -> None:
        """Takes the weights into the state, in place."""

    @abstractmethod
    def result(self, state: State) -> Weights | None:
        """The merged weights, or ``None`` if there are none yet. May be the stored tensors: read them, do not write."""

    def resolve(self, run: RunLength) -> "Rule":
        """This rule with everything that was given relative to the run turned into steps."""
        return self

    def initial_share(self, state: State) -> float:
        """Share of the result that is still the weights of the start, in [0, 1]."""
        return 0.0

    def extend(self, state: State, weights: Weights) -> None:
        """Adds tensors that have not changed since the start (parameters that are unfrozen later)."""
        for key, fresh in self.init(weights).items():
            if isinstance(fresh, dict):
                state[key].update(fresh)
