"""What an average costs beside training: time, and memory."""

from collections.abc import Callable
from statistics import median
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_merge import weights
from lightning_merge.callbacks._publication._average import Average

_TIMED = 11
"""Updates that are timed: enough for a median, few enough to cost nothing in a long run."""


class Stopwatch:
    """Times the first updates of one average in a fit, each alone.

    Several averages share a pass over the live weights, in which none has a time of its own: what is timed is a pass
    of its own. It computes the same numbers.
    """

    def __init__(self, average: Average) -> None:
        self.average = average
        self.times: list[float] = []

    def take_in(self, original: Callable[..., None], *args: Any) -> None:
        """Around the average's ``take_in``."""
        if len(self.times) == _TIMED:
            return original(*args)
        self._wait()
        start = perf_counter()
        with weights.in_one_pass():
            original(*args)
        self._wait()
        self.times.append(perf_counter() - start)
        return None

    def _wait(self) -> None:
        if any(tensor.device.type != "cpu" for tensor in self.average.tensors.values()):
            torch.accelerator.synchronize()

    @property
    def ms_per_step(self) -> float:
        """The median time of an update, spread over the applied steps from one to the next."""
        share = self.average.updates / max(1, self.average.steps)
        return 1000 * median(self.times) * share if self.times else 0.0


def megabytes(average: Average) -> float:
    """What an average keeps, in 10^6 bytes: what a full checkpoint stores of it. Of sharded ones this process' part."""
    kept = {id(leaf): leaf.nbytes for leaf in tree_leaves(average.save()) if isinstance(leaf, Tensor)}
    return sum(kept.values()) / 1e6
