"""DiLoCo: local steps and an outer optimizer."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import OuterStep
from lightning_merge.callbacks._branch_run._settings import Augmentation, Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._publication._options import known
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection


class DiLoCo(Branching):
    """Branches train on data of their own; every H steps their way is the gradient of an outer Nesterov step.

    ``g = anchor - mean``, ``v <- momentum * v + g``, ``anchor <- anchor - lr * (g + momentum * v)``, and all go on from
    the anchor, which is kept in host memory. One branch is allowed: Lookahead with momentum.

    Args:
        branches: Number of branches; at least 1.
        every_n_steps: Steps H that each branch takes between outer steps; at least 1. The authors take 500.
        lr: Outer learning rate; more than 0.
        momentum: Outer momentum, in [0, 1).
        augmentations: One callable per branch that takes the batch, on its device, and returns what its branch trains
            on.
        batches: ``"same"`` batch for all branches, or ``"turns"``: successive batches go to successive branches, and
            ``max_steps`` counts the steps of all; see ``Branching``.
        buffers: ``"average"``: each branch has its own, which mix along. ``"recompute"``: BatchNorm statistics are
            measured again under the mean whenever it is measured or saved. ``"shared"``: all update one set.
        selection: Which parameters are branched; by default all trainable ones.
        name: Prefix of its metrics when it is not the first average, and of its files.
        options: ``optimizer_state``, ``inactive``, ``schedulers``, ``validate``, ``optimizer``,
            ``final_validation`` and ``final_checkpoint``, see ``Branching``.

    Raises:
        ValueError: If an argument is out of its range.

    Example:
        >>> DiLoCo(branches=2).policy
        OuterStep(lr=0.7, momentum=0.9)

    References:
        Douillard et al., "DiLoCo: Distributed low-communication training of language models", 2023, algorithm 1.
    """

    def __init__(
        self,
        branches: int = 2,
        every_n_steps: int = 500,
        lr: float = 0.7,
        momentum: float = 0.9,
        augmentations: Sequence[Augmentation] | None = None,
        batches: Batches = "turns",
        *,
        buffers: Buffers = "average",
        selection: Selection | None = None,
        name: str = "diloco",
        **options: Unpack[BranchingOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        super().__init__(
            OuterStep(lr, momentum),
            EveryNSteps(every_n_steps),
            branches,
            augmentations=augmentations,
            batches=batches,
            buffers=buffers,
            selection=selection,
            name=name,
            **known(options, BranchingOptions, self),
        )
