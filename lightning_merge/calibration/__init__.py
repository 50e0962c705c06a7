"""Calibration: measuring again what merged weights make of data, and giving it back what merging took.

Merged weights make activations that no model of the run had, so running statistics taken from the run do not fit.
"""

from lightning_merge.calibration._repair import repair
from lightning_merge.calibration._statistics import batch_norm_layers, recalibrated_statistics

__all__ = ["batch_norm_layers", "recalibrated_statistics", "repair"]
