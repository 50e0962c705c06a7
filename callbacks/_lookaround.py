"""Lookaround: branches under different augmentations, averaged every few steps."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import Average
from lightning_merge.callbacks._branch_run._settings import Augmentation, Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._publication._options import known
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
            successive branches; ``max_steps`` counts the steps of all branches. ``"own"``: a loader for each, see
            ``Branching``.
        buffers: ``"recompute"``: BatchNorm statistics are measured again under the mean whenever it is measured or
            saved. ``"shared"``: the running statistics that all branches update, as the authors' code does.
            ``"average"``: each branch has its own.
        selection: Which parameters are branched; by default all trainable ones.
        name: Prefix of its metrics when it is not the first average, and of its files.
        options: ``optimizer_state``, ``inactive``, ``schedulers``, ``validate``, ``optimizer``,
            ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``Branching``.

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
        buffers: Buffers = "recompute",
        selection: Selection | None = None,
        name: str = "lookaround",
        **options: Unpack[BranchingOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        super().__init__(
            Average(),
            EveryNSteps(every_n_steps),
            branches,
            augmentations=augmentations,
            batches=batches,
            buffers=buffers,
            selection=selection,
            name=name,
            **known(options, BranchingOptions, self),
        )
