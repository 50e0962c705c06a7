"""What happens to branches that hold a NaN or an infinity."""

from collections.abc import Mapping
from typing import final

from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_merge import weights
from lightning_merge.branches import Branches, Policy
from lightning_merge.callbacks._branch_run._progress import Progress
from lightning_merge.weights import State, Weights


@final
class Divergence:
    """Remembers the last good weights, and brings branches that diverged back.

    Args:
        title: What messages call the branches.
        progress: Where they have come to.
    """

    def __init__(self, title: str, progress: Progress) -> None:
        self.good: Weights = {}
        """The last weights that all branches went on from; empty under a policy that never makes them equal."""
        self._title = title
        self._progress = progress
        self._said = -1

    def remember(self, live: Mapping[str, Tensor]) -> None:
        """All branches go on from these weights."""
        self.good = self._fitting(live)
        weights.copy_(self.good, live)
        self.good |= weights.copies({name: t for name, t in live.items() if name not in self.good})

    def keep(self, policy: Policy, state: State, live: Mapping[str, Tensor]) -> None:
        """Remembers what branches could go back to, where they are equal or their policy keeps only a part of it."""
        kept = policy.last_good(state)
        if policy.restarts or kept:
            self.remember({name: tensor for name, tensor in live.items() if name not in kept})

    def _fitting(self, live: Mapping[str, Tensor]) -> Weights:
        """The last good weights of what is still there in the same shape."""
        return {name: t for name, t in self.good.items() if name in live and live[name].shape == t.shape}

    def revive(self, branches: Branches, diverged: set[int], live: Mapping[str, Tensor]) -> None:
        """Leaves branches out of the merge that follows, and lets them go on from the mean of the others.

        Args:
            branches: All branches.
            diverged: Some of them.
            live: What is in the module, what all branches share included.
        """
        self._progress.revived += len(diverged)
        rank_zero_warn(
            f"{self._title}: branches {sorted(diverged)} hold a NaN or an infinity after group {self._progress.groups}."
            " They are left out of this merge, and go on from the mean of the others with a reset optimizer; `revived`"
            " counts them. Lower the learning rate or clip gradients."
        )
        branches.revive(diverged)
        # What all branches share has seen what the diverged ones made of their batches.
        broken = weights.nonfinite(dict(live))
        good = self._fitting(live)
        weights.copy_({name: live[name] for name in broken if name in good}, good)

    def say_left_out(self, diverged: set[int]) -> None:
        """Says that what is published is the mean of some branches, once between two merges."""
        if self._said != self._progress.merges:
            self._said = self._progress.merges
            rank_zero_warn(
                f"{self._title}: branches {sorted(diverged)} hold a NaN or an infinity after group"
                f" {self._progress.groups}. What is measured, saved and published is the mean of the others. Lower the"
                " learning rate or clip gradients."
            )

    def go_back(self, branches: Branches, live: Mapping[str, Tensor], kept: Weights) -> None:
        """Puts the last good weights into all branches.

        Args:
            branches: All branches.
            live: What is in the module, what all branches share included.
            kept: Last good weights that are the policy's.

        Raises:
            RuntimeError: If there are none.
        """
        what = f"all {branches.count} branches hold a NaN or an infinity after group {self._progress.groups}"
        if not self.good and not kept:
            raise RuntimeError(
                f"{self._title}: {what}, and its policy keeps no weights to go back to. Resume from an earlier"
                " checkpoint with a lower learning rate."
            )
        rank_zero_warn(
            f"{self._title}: {what}. Training stops with the weights of merge {self._progress.merges}, the last good"
            " one. Lower the learning rate or clip gradients."
        )
        devices = {name: live[name].device for name in kept if name in live}
        good = self._fitting(live) | weights.to_devices({name: kept[name] for name in devices}, devices)
        weights.copy_({name: live[name] for name in good}, good)
        branches.assign(good)
        branches.reset_optimizers(set(branches.own))
        self._progress.merged_at = self._progress.trained
