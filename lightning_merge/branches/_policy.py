"""What a policy is: how branches mix."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

from torch import Tensor, nn

from lightning_merge import weights
from lightning_merge.branches._base import Branches
from lightning_merge.weights import State, Weights


class Policy(ABC):
    """How branches mix at a merge, as two functions over a state that the caller owns. A frozen dataclass.

    When they mix is a schedule's business and what becomes of optimizers is the caller's. A branch that diverged has
    been replaced by the mean of the others before ``merge`` is called.
    """

    restarts: ClassVar[bool] = False
    """Whether all branches are equal after a merge. The last such weights are kept, to go back to."""

    def init(self, branches: Branches) -> State:
        """What it remembers before the first merge: tensors, numbers, lists and dicts, which are saved with the run.

        Args:
            branches: The branches as they are when they start.
        """
        return {}

    needs_score: ClassVar[bool] = False
    """Whether it measures weights (``branches.score``)."""

    def published(self, state: State, branches: Branches, active: Mapping[str, Tensor]) -> Weights:
        """The weights that all branches stand for between merges: the mean of those that have not diverged.

        Args:
            state: What it remembers.
            branches: The branches.
            active: The tensors of the active branch, where others are in the module at the moment.
        """
        return branches.mean_of_finite(active)

    def last_good(self, state: State) -> Weights:
        """Weights that all branches can go back to if they have all diverged, where they are not equal after a merge.

        Args:
            state: What it remembers.
        """
        return {}

    def look_again(self, state: State, branches: Branches) -> None:  # noqa: B027 (most remember no weights)
        """Takes what is branched from here on, and was frozen before, into what it remembers of weights.

        Args:
            state: What it remembers; changed in place.
            branches: The branches, with the new tensors.
        """

    def after_group(self, state: State, branches: Branches) -> None:  # noqa: B027 (most send nothing that comes later)
        """Is called after each group, before a merge that is due then.

        Args:
            state: What it remembers; may be changed in place.
            branches: The branches.
        """

    def settle(self, state: State, branches: Branches) -> None:  # noqa: B027 (most have nothing on its way)
        """Waits for what is on its way and puts it into the state, which is about to be saved. In all processes.

        Args:
            state: What it remembers; changed in place.
            branches: The branches.
        """

    def start_again(self, state: State, branches: Branches, names: Sequence[str]) -> None:
        """Makes what it remembers of some tensors what it would be if the branches started now.

        Args:
            state: What it remembers; changed in place.
            branches: The branches, all with the same of these tensors.
            names: Canonical names.
        """
        fresh = self.init(branches)
        for key, kept in state.items():
            if isinstance(kept, dict):
                own = fresh.get(key, {})
                for name in names:
                    if name in own:
                        kept[name] = own[name]
                    else:
                        kept.pop(name, None)

    @abstractmethod
    def merge(self, state: State, branches: Branches) -> None:
        """Mixes the branches, by ``branches.mix`` or by ``mean``, ``assign`` and ``gather``; may change the state.

        Args:
            state: What it remembers; may be changed in place.
            branches: The branches to mix.
        """


def newly_branched(kept: Mapping[str, Tensor], branches: Branches) -> Weights:
    """Parameters that are branched and not among these, as all branches have them, in the precision of averages."""
    own = branches.weights(branches.own[0])
    new = {n: own[n] for n, t in branches.live.items() if isinstance(t, nn.Parameter) and n not in kept}
    return weights.clone(new)
