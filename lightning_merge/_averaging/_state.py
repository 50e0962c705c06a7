"""What an average saves, declared once."""

from dataclasses import dataclass
from typing import Any

from lightning_merge._saved import Saved
from lightning_merge.weights import State, Weights


@dataclass
class AveragingState(Saved):
    """What an average needs to go on bit for bit; the fields are the keys of its section.

    Args:
        state: Of the rule, as the rule saves it.
        evaluations: Scores that the rule was told of raw weights.
        buffers: The copied buffers, as they are published.
        calibrated_at: ``version`` of the merged weights when they were made to fit them.
        recent: The kept batches, as far as they are plain data.
        last_epoch: Epochs completed when an epoch's end was last handled.
        update_window: First and last applied step whose weights were taken in.
        skipped_nonfinite: Updates left out because of a NaN or an infinity.
    """

    state: State | None
    evaluations: int
    buffers: Weights
    calibrated_at: list[int] | None
    recent: Any
    last_epoch: int
    update_window: list[int] | None
    skipped_nonfinite: int
