"""WARP: branches held by moving averages of their own, merged on the sphere, and a step back to the start."""

from collections.abc import Sequence
from typing import Any, Unpack

from lightning.pytorch import LightningModule

from lightning_merge._checks import number, whole
from lightning_merge.branches import Combine
from lightning_merge.callbacks._branch_run._anchors import Anchors
from lightning_merge.callbacks._branch_run._settings import Augmentation, Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._publication._options import known
from lightning_merge.combiners import SLERP
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection


class WARP(Branching):
    """Rounds of training from one start; all branches go on a part of the way to the spherical mean of their ends.

    ``anchor_j <- decay * anchor_j + (1 - decay) * w_j`` after every step of branch ``j``; ``w_j, anchor_j <- base +
    scale * slerp(w_1 - base, w_2 - base)`` at the end of a round, which is the next base. A training step is held near
    the anchor of its branch by a penalty of the module's own: within ``teacher(self, "warp")`` the module holds that
    anchor. Branches take turns in one process: ``BranchStrategy`` is refused.

    Args:
        branches: Number of branches; at least 1. The authors take 2; more are folded in their order.
        every_n_steps: Steps that each branch takes in a round; at least 1.
        scale: Share of the way that is gone, in (0, 1].
        decay: Share of the old anchor kept at each step, in [0, 1).
        augmentations: One callable per branch that takes the batch, on its device, and returns what its branch trains
            on.
        batches: ``"same"`` batch for all branches, a loader for each (``"own"``), or ``"turns"``: successive batches go
            to successive branches, and ``max_steps`` counts the steps of all; see ``Branching``.
        buffers: ``"average"``: each branch has its own, which mix along. ``"shared"``: all update one set. Under the
            anchor those of the branch are used. ``"recompute"``: BatchNorm statistics are measured again under the mean
            whenever it is measured or saved; not for a module with BatchNorm that asks for its anchor.
        selection: Which parameters are branched; by default all trainable ones.
        name: Prefix of its metrics when it is not the first average, and of its files.
        options: ``optimizer_state`` (by default ``"reset"``, since a round is a training of its own), ``inactive``,
            ``schedulers``, ``validate``, ``optimizer``, ``final_validation``, ``final_checkpoint`` and ``log_health``,
            see ``Branching``.

    Raises:
        ValueError: If an argument is out of its range, or at fit start with a branch in each process.

    Example:
        >>> WARP(every_n_steps=100).policy
        Combine(combiner=SLERP(t=0.5, scale=0.3), base='last')

    References:
        Ramé et al., "WARP: on the benefits of weight averaged rewarded policies", 2024, algorithm 1.
    """

    def __init__(
        self,
        branches: int = 2,
        every_n_steps: int = 100,
        scale: float = 0.3,
        decay: float = 0.99,
        augmentations: Sequence[Augmentation] | None = None,
        batches: Batches = "turns",
        *,
        buffers: Buffers = "average",
        selection: Selection | None = None,
        name: str = "warp",
        **options: Unpack[BranchingOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        scale = number("scale", scale, "(0, 1]")
        decay = number("decay", decay, "[0, 1)")
        options.setdefault("optimizer_state", "reset")
        super().__init__(
            Combine(SLERP(scale=scale)),
            EveryNSteps(every_n_steps),
            branches,
            augmentations=augmentations,
            batches=batches,
            buffers=buffers,
            selection=selection,
            name=name,
            **known(options, BranchingOptions, self),
        )
        self.decay = decay
        self._anchors = Anchors(decay)

    def setup(self, trainer: Any, pl_module: LightningModule, stage: str) -> None:
        """Refuses a branch in each process, whose anchors no file would hold."""
        super().setup(trainer, pl_module, stage)
        if self._strategy is not None:
            raise ValueError(
                f"{self.title} keeps the anchors of all branches in one process. Use a single device, or"
                " `Branching(Combine(SLERP(scale=0.3)))` for WARP's merges without anchors under BranchStrategy."
            )
