"""PAPA: a population that is pulled to its mean."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import PullToMean
from lightning_merge.callbacks._branch_run._settings import Augmentation, Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._publication._options import known
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection


class PAPA(Branching):
    """Branches train apart and are pulled to their mean: ``w_j <- (1 - p) w_j + p * mean``, ``p = pull * lr / lr_0``.

    The mean is what is published. PAPA-all is ``Branching(Average(), EveryNEpochs(5), branches)``, PAPA-2
    ``Branching(Pairs(), EveryNEpochs(5), branches)``.

    Args:
        branches: Number of branches; at least 1.
        every_n_steps: Steps that each branch takes between pulls; at least 1. The authors take 10.
        pull: Share of the way to the mean at the first learning rate, in [0, 1]: 0.01 from scratch, 0.0005 for
            fine-tuning.
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
        >>> PAPA(branches=3, pull=0.02).policy
        PullToMean(pull=0.02, with_rate=True)

    References:
        Jolicoeur-Martineau et al., "PopulAtion Parameter Averaging (PAPA)", TMLR 2024, equation 2.
    """

    def __init__(
        self,
        branches: int = 3,
        every_n_steps: int = 10,
        pull: float = 0.01,
        augmentations: Sequence[Augmentation] | None = None,
        batches: Batches = "same",
        *,
        buffers: Buffers = "average",
        selection: Selection | None = None,
        name: str = "papa",
        **options: Unpack[BranchingOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        super().__init__(
            PullToMean(pull),
            EveryNSteps(every_n_steps),
            branches,
            augmentations=augmentations,
            batches=batches,
            buffers=buffers,
            selection=selection,
            name=name,
            **known(options, BranchingOptions, self),
        )
