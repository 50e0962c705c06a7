"""Continual learning by merging, in plain torch and torchmetrics: how a stream is split and judged, what heads need."""

from lightning_merge.continual._accuracy_matrix import AccuracyMatrix
from lightning_merge.continual._bank import Bank
from lightning_merge.continual._heads import (
    grow_head,
    head_parameters,
    join_head,
    masked_cross_entropy,
    only,
    remapped,
)
from lightning_merge.continual._metrics import (
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
from lightning_merge.continual._presets import PRESETS, InitFrom, Preset
from lightning_merge.continual._split import Split, indices_of, labels_of
from lightning_merge.continual._stream_state import StreamState

__all__ = [
    "PRESETS",
    "AccuracyMatrix",
    "AverageIncremental",
    "BackwardTransfer",
    "Bank",
    "FinalAverage",
    "Forgetting",
    "ForwardTransfer",
    "InitFrom",
    "OfMatrix",
    "Plasticity",
    "Preset",
    "Split",
    "Stability",
    "StreamState",
    "continual_metrics",
    "grow_head",
    "head_parameters",
    "indices_of",
    "join_head",
    "labels_of",
    "masked_cross_entropy",
    "only",
    "remapped",
]
