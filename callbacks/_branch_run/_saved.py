"""What a file keeps of branches."""

from dataclasses import dataclass, field
from typing import Any, final

from lightning_merge._saved import Saved
from lightning_merge.callbacks._branch_run._progress import Progress
from lightning_merge.weights import State, Weights


@final
@dataclass
class BranchesSaved(Saved):
    """Section of a file.

    Attributes:
        progress: Counters.
        branches: Weights and optimizer states of the branches; ``None`` before a fit has begun.
        good: The last good weights; empty while all branches are equal.
        policy: State of the policy; ``None`` before a fit has begun.
        recent: The batches kept for BatchNorm statistics.
        anchors: The anchor of each branch, where the callback keeps such.
    """

    progress: Progress
    branches: State | None
    good: Weights
    policy: State | None
    recent: Any
    anchors: dict[int, Weights] | None = None

    @property
    def earlier(self) -> "Earlier":
        """What a fit goes on from."""
        return Earlier(self.branches, self.policy, self.good)


@final
@dataclass
class Earlier:
    """What the branches of a fit go on from: those of a file or of an earlier fit.

    Attributes:
        branches: Weights and optimizer states; ``None``: they start from the module.
        policy: State of the policy, if there is one.
        good: The last good weights.
    """

    branches: State | None = None
    policy: State | None = None
    good: Weights = field(default_factory=dict)
