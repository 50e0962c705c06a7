"""Trajectory: checkpoints on disk as a sequence that is read tensor by tensor."""

from lightning_merge.files._lazy import Checkpoint
from lightning_merge.trajectory._coefficients import (
    by_decay,
    exponential,
    linear,
    mean,
    window,
    wsm_1_sqrt,
    wsm_cosine,
    wsm_exponential,
    wsm_linear,
)
from lightning_merge.trajectory._trajectory import Trajectory

__all__ = [
    "Checkpoint",
    "Trajectory",
    "by_decay",
    "exponential",
    "linear",
    "mean",
    "window",
    "wsm_1_sqrt",
    "wsm_cosine",
    "wsm_exponential",
    "wsm_linear",
]
