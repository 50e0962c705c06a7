"""Combiners: how several models are merged, as a stream of task vectors."""

from lightning_merge.combiners._average import Average
from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._exponential_average import ExponentialAverage
from lightning_merge.combiners._magmax import MagMax
from lightning_merge.combiners._scale import Scale
from lightning_merge.combiners._sum import Sum
from lightning_merge.combiners._vectors import add_vector, analogy, negate, task_vector

__all__ = [
    "Average",
    "Combiner",
    "ExponentialAverage",
    "MagMax",
    "Scale",
    "Sum",
    "add_vector",
    "analogy",
    "negate",
    "task_vector",
]
