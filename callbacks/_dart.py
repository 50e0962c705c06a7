"""DART: diversify, aggregate, repeat."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import Average
from lightning_merge.callbacks._branch_run._settings import Augmentation, Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._publication._options import known
from lightning_merge.schedules import LocalSteps
from lightning_merge.selections import Selection


class DART(Branching):
    """Branches train as one up to a step, then apart under different augmentations, and are averaged every k steps.

    ``w_j <- (w_1 + ... + w_K) / K`` after every step up to ``start``, then after every ``every_n_steps`` steps:
    Lookaround with a late start and a long way between averages.

    Args:
        branches: Number of branches; at least 1.
        every_n_steps: Steps that each branch takes between averages after the start; at least 1. The authors take
            epochs.
        start: Step at which branches part; a float in [0, 1) is a share of the run.
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
        >>> DART(branches=3, every_n_steps=600).schedule
        LocalSteps(n=600, start=0.5)

    References:
        Jain et al., "DART: Diversify-aggregate-repeat training improves generalization of neural networks", CVPR 2023.
    """

    def __init__(
        self,
        branches: int = 3,
        every_n_steps: int = 500,
        start: int | float = 0.5,
        augmentations: Sequence[Augmentation] | None = None,
        batches: Batches = "same",
        *,
        buffers: Buffers = "recompute",
        selection: Selection | None = None,
        name: str = "dart",
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
