"""Diagnostics: whether sets of weights can be merged, and what is wrong where they cannot.

Lengths and angles are those of all parameters taken as one vector, in float64; statistics of BatchNorm layers are no
part of it. Whatever takes a score takes a loss: lower is better.
"""

from lightning_merge.diagnostics._barrier import barrier
from lightning_merge.diagnostics._examination import Examination, Finding
from lightning_merge.diagnostics._examination import Problem as Problem
from lightning_merge.diagnostics._examine import MOST_POINTS as MOST_POINTS
from lightning_merge.diagnostics._examine import examine
from lightning_merge.diagnostics._geometry import (
    between,
    cosine,
    difference,
    distance,
    dot,
    mean,
    norm,
    parameters,
    sign_conflicts,
    successive_cosines,
)
from lightning_merge.diagnostics._statistics import never_measured, statistics_shift

__all__ = [
    "Examination",
    "Finding",
    "barrier",
    "between",
    "cosine",
    "difference",
    "distance",
    "dot",
    "examine",
    "mean",
    "never_measured",
    "norm",
    "parameters",
    "sign_conflicts",
    "statistics_shift",
    "successive_cosines",
]
