"""What a file keeps of TWA, and what is counted."""

from dataclasses import dataclass
from typing import Any, final

from lightning_merge._saved import Saved
from lightning_merge.weights import State, Weights


@final
@dataclass
class TWASaved(Saved):
    """What a file keeps of TWA.

    Attributes:
        subspace: The snapshots and their coefficients; ``None`` before a fit has begun.
        stage_steps: Steps of the second stage.
        buffers: As they were at the last of them.
        calibrated_at: ``version`` when the statistics among the buffers were measured.
        recent: The batches that they are measured on.
        skipped_nonfinite: Snapshots and steps left out.
    """

    subspace: State | None
    stage_steps: int
    buffers: Weights
    calibrated_at: list[int] | None
    recent: Any
    skipped_nonfinite: int


@final
@dataclass
class Counts:
    """Steps of the second stage, and what was left out because of a NaN or an infinity."""

    stage_steps: int = 0
    skipped: int = 0
