"""How far the branches of a run have come."""

from dataclasses import dataclass
from typing import final

from lightning_merge._saved import Saved


@final
@dataclass
class Progress(Saved):
    """Counters of a run, which its files keep.

    Attributes:
        groups: Groups completed: one training step of every branch.
        merges: Merges.
        revived: Times that a branch had diverged at a merge.
        epochs: Epochs whose end was looked at.
        trained: Turns that weights have changed in, over all branches.
        turn: Branches that are through with the group that is going on.
        merged_at: ``trained`` when all branches were last made equal.
        logged: Merges that loggers were told of, by a callback that tells them.
    """

    groups: int = 0
    merges: int = 0
    revived: int = 0
    epochs: int = 0
    trained: int = 0
    turn: int = 0
    merged_at: int = -1
    logged: int | None = None

    @property
    def equal(self) -> bool:
        """Whether all branches are the same, since none has trained after the last merge."""
        return self.merged_at == self.trained
