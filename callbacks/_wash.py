"""WASH: branches that exchange a few random numbers at every step."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import Shuffle
from lightning_merge.callbacks._branch_run._settings import Augmentation, Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._publication._options import known
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection


class WASH(Branching):
    """Branches train apart and at every step permute a few random coordinates among each other.

    A coordinate of layer ``l`` of ``L`` is permuted with probability ``share * (1 - l / (L - 1))``. The mean and the
    spread of the branches stay; what they learn mixes. The mean is what is published.

    Args:
        branches: Number of branches; at least 1.
        every_n_steps: Steps that each branch takes between shuffles; at least 1.
        share: Probability in the first layer, in [0, 1].
        seed: Of the coordinates and permutations.
        augmentations: One callable per branch that takes the batch, on its device, and returns what its branch trains
            on.
        batches: ``"same"`` batch for all branches, a loader for each (``"own"``), or ``"turns"``: successive batches go
            to successive branches, and ``max_steps`` counts the steps of all; see ``Branching``.
        buffers: ``"average"``: each branch has its own, which mix along. ``"recompute"``: BatchNorm statistics are
            measured again under the mean whenever it is measured or saved. ``"shared"``: all update one set.
        selection: Which parameters are branched; by default all trainable ones.
        name: Prefix of its metrics when it is not the first average, and of its files.
        options: ``optimizer_state``, ``inactive``, ``schedulers``, ``validate``, ``optimizer``,
            ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``Branching``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> WASH(branches=3, share=0.01).policy
        Shuffle(share=0.01, seed=0)

    References:
        Fournier et al., "WASH: Train your ensemble with communication-efficient weight shuffling, then average",
        2024.
    """

    def __init__(
        self,
        branches: int = 3,
        every_n_steps: int = 1,
        share: float = 1e-3,
        seed: int = 0,
        augmentations: Sequence[Augmentation] | None = None,
        batches: Batches = "same",
        *,
        buffers: Buffers = "recompute",
        selection: Selection | None = None,
        name: str = "wash",
        **options: Unpack[BranchingOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        super().__init__(
            Shuffle(share, seed),
            EveryNSteps(every_n_steps),
            branches,
            augmentations=augmentations,
            batches=batches,
            buffers=buffers,
            selection=selection,
            name=name,
            **known(options, BranchingOptions, self),
        )
