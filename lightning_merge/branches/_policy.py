"""What a policy is: how branches mix."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

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
        """What it remembers before the first merge: tensors, numbers, lists and dicts, which are saved with the run."""
        return {}

    needs_score: ClassVar[bool] = False
    """Whether it measures weights (``branches.score``)."""

    def published(self, state: State, branches: Branches, active: Mapping[str, Tensor]) -> Weights:
        """The weights that all branches stand for between merges: their mean.

        Args:
            state: What it remembers.
            branches: The branches.
            active: The tensors of the active branch, where others are in the module at the moment.
        """
        return branches.mean(active=active)

    @abstractmethod
    def merge(self, state: State, branches: Branches) -> None:
        """Mixes the branches, by ``branches.mix`` or by ``mean``, ``assign`` and ``gather``; may change the state."""
