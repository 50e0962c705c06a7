"""Local SGD and post-local SGD."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import Average
from lightning_merge.callbacks._branch_run._settings import Augmentation, Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._publication._options import known
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
        buffers: Buffers = "average",
        selection: Selection | None = None,
        name: str = "localsgd",
        **options: Unpack[BranchingOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        super().__init__(
            Average(),
            LocalSteps(every_n_steps, start),
            branches,
            augmentations=augmentations,
            batches=batches,
            buffers=buffers,
            selection=selection,
            name=name,
            **known(options, BranchingOptions, self),
        )
