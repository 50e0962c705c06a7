"""Lookaround: branches under different augmentations, averaged every few steps."""

from collections.abc import Sequence
from typing import Literal, Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import Average
from lightning_merge.branches._in_turn import Inactive
from lightning_merge.callbacks._branch_run._turns import Augmentation
from lightning_merge.callbacks._branching import Batches, Branching, Buffers, OptimizerState
from lightning_merge.callbacks._publication._average import AverageOptions
from lightning_merge.callbacks._publication._callback import Validate
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection


class Lookaround(Branching):
    """Around k steps in every branch, then all go on from the mean: ``w_j <- (w_1 + ... + w_d) / d``.

    Every branch trains with the module's own optimizer, on the same batch in its own augmentation or on batches of its
    own. Momentum belongs to the branch and survives the average. Validation, files and the final model hold the mean.

    Args:
        branches: Number of branches d; at least 1. One is the plain optimizer.
        every_n_steps: Steps k that each branch takes between averages; at least 1.
        augmentations: One callable per branch that takes the batch, on its device, and returns the batch its branch
            trains on; ``None`` trains all on the batch as it is. The paper takes a flip, AutoAugment and RandAugment.
        batches: ``"same"``: a batch of the loader goes through every branch, so epochs, ``max_steps`` and schedules
            mean what they always mean and a run takes d times the computation. ``"turns"``: successive batches go to
            successive branches; ``max_steps`` counts the steps of all branches.
        optimizer_state: At an average, ``"keep"`` each branch's state, as the paper does, ``"average"`` or ``"reset"``.
        buffers: ``"recompute"``: BatchNorm statistics are measured again under the mean whenever it is measured or
            saved. ``"shared"``: the running statistics that all branches update, as the authors' code does.
            ``"average"``: each branch has its own.
        inactive: Where the branches that do not train at the moment are: ``"device"`` or ``"cpu"``.
        schedulers: With ``batches="turns"``, whether schedules of the interval ``"step"`` move per ``"group"`` of one
            step in every branch, or per ``"step"``: then size them by ``trainer.estimated_stepping_batches`` as ever.
        selection: Which parameters are branched; by default all trainable ones.
        validate: Which weights validation measures, ``"merged"`` (the mean), ``"raw"`` (a branch) or ``"both"``.
        name: Prefix of its metrics when it is not the first average, and of its files.
        optimizer: Index of the optimizer whose step ends a branch's turn, where there are several.
        options: ``final_validation`` and ``final_checkpoint``, see ``AverageOptions``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> mirrored = [lambda batch: batch, lambda batch: [batch[0].flip(-1), batch[1]]]
        >>> Lookaround(branches=2, augmentations=mirrored).name
        'lookaround'

    References:
        Zhang et al., "Lookaround optimizer: k steps around, 1 step average", NeurIPS 2023, algorithm 1.
    """

    def __init__(
        self,
        branches: int = 3,
        every_n_steps: int = 5,
        augmentations: Sequence[Augmentation] | None = None,
        batches: Batches = "same",
        *,
        optimizer_state: OptimizerState = "keep",
        buffers: Buffers = "recompute",
        inactive: Inactive = "device",
        schedulers: Literal["group", "step"] = "group",
        selection: Selection | None = None,
        validate: Validate = "merged",
        name: str = "lookaround",
        optimizer: int = 0,
        **options: Unpack[AverageOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        super().__init__(
            Average(),
            EveryNSteps(every_n_steps),
            branches,
            augmentations=augmentations,
            batches=batches,
            optimizer_state=optimizer_state,
            buffers=buffers,
            inactive=inactive,
            schedulers=schedulers,
            selection=selection,
            validate=validate,
            name=name,
            optimizer=optimizer,
            **options,
        )
