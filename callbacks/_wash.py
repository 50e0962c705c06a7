"""WASH: branches that exchange a few random numbers at every step."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import Shuffle
from lightning_merge.branches._in_turn import Inactive
from lightning_merge.callbacks._branch_run._turns import Augmentation
from lightning_merge.callbacks._branching import Batches, Branching, Buffers, OptimizerState
from lightning_merge.callbacks._publication._average import AverageOptions
from lightning_merge.callbacks._publication._callback import Validate
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
        batches: ``"same"`` batch for all branches, or ``"turns"``: successive batches go to successive branches, and
            ``max_steps`` counts the steps of all; see ``Branching``.
        optimizer_state: At a merge, ``"keep"`` each branch's, ``"average"`` or ``"reset"``.
        buffers: ``"average"``: each branch has its own, which mix along. ``"recompute"``: BatchNorm statistics are
            measured again under the mean whenever it is measured or saved. ``"shared"``: all update one set.
        inactive: Where the branches that do not train at the moment are: ``"device"`` or ``"cpu"``.
        selection: Which parameters are branched; by default all trainable ones.
        validate: Which weights validation measures, ``"merged"`` (the mean), ``"raw"`` (a branch) or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        optimizer: Index of the optimizer whose step ends a branch's turn, where there are several.
        options: ``final_validation`` and ``final_checkpoint``, see ``AverageOptions``.

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
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "recompute",
        inactive: Inactive = "device",
        selection: Selection | None = None,
        validate: Validate = "merged",
        name: str = "wash",
        optimizer: int = 0,
        **options: Unpack[AverageOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        super().__init__(
            Shuffle(share, seed),
            EveryNSteps(every_n_steps),
            branches,
            augmentations=augmentations,
            batches=batches,
            optimizer_state=optimizer_state,
            buffers=buffers,
            inactive=inactive,
            selection=selection,
            validate=validate,
            name=name,
            optimizer=optimizer,
            **options,
        )
