"""DiLoCo: local steps and an outer optimizer, of the whole model at once or of fragments in turn."""

from collections.abc import Sequence
from typing import Unpack

from lightning_merge._checks import whole
from lightning_merge.branches import OuterStep, Policy, StreamingOuterStep
from lightning_merge.branches._quantised import Bits
from lightning_merge.callbacks._branch_run._settings import Augmentation, Batches, BranchingOptions, Buffers
from lightning_merge.callbacks._branching import Branching
from lightning_merge.callbacks._publication._options import known
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection


class DiLoCo(Branching):
    """Branches train on data of their own; every H steps their way is the gradient of an outer Nesterov step.

    ``g = anchor - mean``, ``v <- momentum * v + g``, ``anchor <- anchor - lr * (g + momentum * v)``, and all go on from
    the anchor, which is kept in host memory. One branch is allowed: Lookahead with momentum.

    Streaming DiLoCo sends ``fragments`` of the layers in turn, ``H / fragments`` steps apart, uses what comes back
    ``delay`` steps later, ``w_j <- (1 - mix) * w_j + mix * anchor``, and rounds what travels to ``bits``: see
    ``StreamingOuterStep``. With a branch per process the exchange runs beside the training steps of the delay.

    Args:
        branches: Number of branches; at least 1.
        every_n_steps: Steps H that each branch takes between outer steps of the same weights; at least 1. The authors
            take 500, and 100 for streaming.
        lr: Outer learning rate; more than 0.
        momentum: Outer momentum, in [0, 1).
        augmentations: One callable per branch that takes the batch, on its device, and returns what its branch trains
            on.
        batches: ``"same"`` batch for all branches, a loader for each (``"own"``), or ``"turns"``: successive batches go
            to successive branches, and ``max_steps`` counts the steps of all; see ``Branching``.
        fragments: Parts of the model that merge in turn, made of whole layers; divides ``every_n_steps``. At most as
            many as there are layers.
        delay: Steps of each branch between sending a fragment and using the outer step; at least 0, and less than
            ``every_n_steps``.
        mix: Share of the anchor in what a branch goes on from, in (0, 1]. The authors take 0.5 with a delay.
        bits: Of each number on its way: 32; 8; or 4, as whole numbers instead of the authors' 4-bit floats. Buffers are
            not rounded.
        buffers: ``"average"``: each branch has its own, which mix along. ``"recompute"``: BatchNorm statistics are
            measured again under the mean whenever it is measured or saved. ``"shared"``: all update one set.
        selection: Which parameters are branched; by default all trainable ones.
        name: Prefix of its metrics when it is not the first average, and of its files.
        options: ``optimizer_state``, ``inactive``, ``schedulers``, ``validate``, ``optimizer``,
            ``final_validation``, ``final_checkpoint`` and ``log_health``, see ``Branching``.

    Raises:
        ValueError: If an argument is out of its range, or at the first batch if there are more fragments than layers.

    Example:
        >>> DiLoCo(branches=2).policy
        OuterStep(lr=0.7, momentum=0.9)
        >>> DiLoCo(2, 100, fragments=4, delay=5, mix=0.5, bits=8).schedule
        EveryNSteps(n=25, start=0)

    References:
        Douillard et al., "DiLoCo: Distributed low-communication training of language models", 2023, algorithm 1.
        Douillard et al., "Streaming DiLoCo with overlapping communication", 2025, algorithm 2.
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
        fragments: int = 1,
        delay: int = 0,
        mix: float = 1.0,
        bits: Bits = 32,
        buffers: Buffers = "average",
        selection: Selection | None = None,
        name: str = "diloco",
        **options: Unpack[BranchingOptions],
    ) -> None:
        every_n_steps = whole("every_n_steps", every_n_steps, 1)
        streaming = StreamingOuterStep(fragments, delay, mix, bits, lr, momentum)
        is_plain = streaming == StreamingOuterStep(1, 0, 1.0, 32, lr, momentum)
        policy: Policy = OuterStep(lr, momentum) if is_plain else streaming
        if not is_plain:
            _check_streaming(streaming, every_n_steps, known(options, BranchingOptions, self))
        super().__init__(
            policy,
            EveryNSteps(every_n_steps // streaming.fragments),
            branches,
            augmentations=augmentations,
            batches=batches,
            buffers=buffers,
            selection=selection,
            name=name,
            **known(options, BranchingOptions, self),
        )


def _check_streaming(policy: StreamingOuterStep, every_n_steps: int, options: BranchingOptions) -> None:
    """Checks what goes round in ``every_n_steps``."""
    if every_n_steps % policy.fragments:
        raise ValueError(
            f"`fragments` must divide `every_n_steps`, got {policy.fragments} fragments and {every_n_steps} steps: one"
            " is sent every `every_n_steps / fragments` steps."
        )
    if policy.delay >= every_n_steps:
        raise ValueError(
            f"`delay` must be less than `every_n_steps`, got {policy.delay} and {every_n_steps}: the outer step of a"
            " fragment is used before the fragment is sent again."
        )
    if options.get("optimizer_state", "keep") != "keep":
        raise ValueError(
            "`optimizer_state` must be 'keep' with `fragments`, `delay`, `mix` or `bits`, got"
            f" {options['optimizer_state']!r}: a merge of some layers would change what the optimizer knows of all."
        )
