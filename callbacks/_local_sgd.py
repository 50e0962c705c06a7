"""Local SGD and post-local SGD."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import Average
from lightning_merge.branches._in_turn import Inactive
from lightning_merge.callbacks._branch_run._turns import Augmentation
from lightning_merge.callbacks._branching import Batches, Branching, Buffers, OptimizerState
from lightning_merge.callbacks._publication._average import AverageOptions
from lightning_merge.callbacks._publication._callback import Validate
from lightning_merge.schedules import LocalSteps
from lightning_merge.selections import Selection


class LocalSGD(Branching):
    """Branches train on data of their own and are averaged every H steps: ``w_j <- (w_1 + ... + w_K) / K``.

    Post-local SGD averages after every step up to ``start``. With ``BranchStrategy`` each branch is a process, and what
    is communicated is one set of weights per average instead of a gradient per step.

    Args:
        branches: Number of branches; at least 1.
        every_n_steps: Steps H that each branch takes between averages; at least 1.
        start: Steps that are averaged each, before branches train apart; a float in [0, 1) is a share of the run.
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
        >>> LocalSGD(branches=2, every_n_steps=16, start=100).schedule
        LocalSteps(n=16, start=100)

    References:
        Stich, "Local SGD converges fast and communicates little", ICLR 2019. Lin et al., "Don't use large
        mini-batches, use local SGD", ICLR 2020 (post-local SGD).
    """

    def __init__(
        self,
        branches: int = 2,
        every_n_steps: int = 8,
        start: int | float = 0,
        augmentations: Sequence[Augmentation] | None = None,
        batches: Batches = "turns",
        *,
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "average",
        inactive: Inactive = "device",
        selection: Selection | None = None,
        validate: Validate = "merged",
        name: str = "localsgd",
        optimizer: int = 0,
        **options: Unpack[AverageOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        super().__init__(
            Average(),
            LocalSteps(every_n_steps, start),
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
