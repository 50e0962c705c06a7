"""What averages take of a step, measured in the first updates of a fit."""

import math
import statistics
import time
from typing import final

from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer

from lightning_merge.callbacks._publication._average import Average

_UPDATES = 20
"""After the first, which makes the average."""

_SHARE = 0.02
"""Of a step, above which it is said."""

_LEAST = 0.5e-3
"""Seconds per step, below which it is not: of the short steps of a toy any hook is a share."""


@final
class Toll:
    """Time of the hook that hands weights to averages, beside that of the whole steps of the same optimizer.

    It is time of the host: no device is waited for. After ``_UPDATES`` updates it says once what they take if that is
    more than ``_SHARE`` of a step, at least ``_LEAST`` seconds, and there is a cure.
    """

    def __init__(self) -> None:
        self._optimizer: Optimizer | None = None  # the first whose weights were taken in
        self._last = 0.0  # when its last hook ended
        self._steps = 0
        self._hooks: list[float] = []
        self._others: list[float] = []  # seconds of the same steps without the hook
        self._is_over = False

    def note(self, optimizer: Optimizer, began: float, served: list[Average]) -> None:
        """Called at the end of the hook.

        Args:
            optimizer: Has applied a step.
            began: When the hook began.
            served: Averages that took the weights in, none if it was not due.
        """
        if self._is_over:
            return
        now = time.perf_counter()
        if self._optimizer is None:
            if served:
                self._optimizer, self._last = optimizer, now
            return
        if optimizer is not self._optimizer:
            return
        self._steps += 1
        if served:
            self._hooks.append(now - began)
            self._others.append(began - self._last)
        self._last = now
        if len(self._hooks) == _UPDATES:
            self._is_over = True
            self._say(served)

    def _say(self, served: list[Average]) -> None:
        cadence = self._steps / len(self._hooks)
        hook, others = statistics.median(self._hooks), statistics.median(self._others)
        share = hook / (hook + cadence * others)
        if share <= _SHARE or hook / cadence < _LEAST:
            return
        rarer = math.ceil(hook * (1 - _SHARE) / (_SHARE * max(others, 1e-9)))
        cures = {average.title: cure for average in served if (cure := average.cheaper(rarer)) is not None}
        if not cures:
            return
        size = sum(tensor.nbytes for average in served for tensor in average.tensors.values())
        step = hook / cadence + others
        rank_zero_info(
            f"{' and '.join(cures)}: taking in weights costs {1e3 * hook / cadence:,.1f} ms and"
            f" {size / cadence / 1e6:,.1f} MB per step, {share:.0%} of its {1e3 * step:,.1f} ms (time of the host, over"
            f" {len(self._hooks)} updates). For {_SHARE:.0%}: {', '.join(dict.fromkeys(cures.values()))}."
        )
