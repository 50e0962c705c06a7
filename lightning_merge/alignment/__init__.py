"""Alignment: hidden units of one network put into the order of another's, before their weights are merged.

Networks from different starts compute alike with units in other orders, so that a mean of their weights means nothing.
"""

from lightning_merge.alignment._align import align
from lightning_merge.alignment._units import Units, units

__all__ = ["Units", "align", "units"]
