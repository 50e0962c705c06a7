"""Continual learning by merging, in plain torch and torchmetrics: how a stream is split and judged, what heads need."""

from lightning_merge.continual._bank import Bank
from lightning_merge.continual._heads import grow_head, masked_cross_entropy, only, remapped
from lightning_merge.continual._metrics import (
    AccuracyMatrix,
    AverageIncremental,
    BackwardTransfer,
    FinalAverage,
    Forgetting,
    ForwardTransfer,
    OfMatrix,
    Plasticity,
    Stability,
    continual_metrics,
)
from lightning_merge.continual._split import Split, indices_of, labels_of

__all__ = [
    "AccuracyMatrix",
    "AverageIncremental",
    "BackwardTransfer",
    "Bank",
    "FinalAverage",
    "Forgetting",
    "ForwardTransfer",
    "OfMatrix",
    "Plasticity",
    "Split",
    "Stability",
    "continual_metrics",
    "grow_head",
    "indices_of",
    "labels_of",
    "masked_cross_entropy",
    "only",
    "remapped",
]
