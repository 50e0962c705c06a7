"""Averages that are held in host memory while their weights are on a device."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor

from lightning_merge import weights
from lightning_merge._checks import one_of
from lightning_merge._to_host import ToHost
from lightning_merge.weights import Weights

Device: TypeAlias = Literal["cpu"] | torch.device | None
"""Where an average is: ``None`` for where the weights are; the word and torch's object are the same."""


def checked_device(device: Device) -> Literal["cpu"] | None:
    """The word for host memory, or nothing.

    Raises:
        ValueError: If it is another device.
    """
    word = "cpu" if isinstance(device, torch.device) and device.type == "cpu" else device
    one_of("device", word, (None, "cpu"), "None (where the weights are) or 'cpu' (host memory)")
    return word  # type: ignore[return-value]


@final
@dataclass
class Taken:
    """The weights of a step, as a rule and the buffers take them in.

    Args:
        averaged: What goes through the rule.
        copied: What is copied.
        way: How copies get into host memory, if they are such; to be waited for.
    """

    averaged: Weights
    copied: Weights
    way: ToHost = ToHost()  # noqa: RUF009 (that of nothing, which holds nothing)

    @classmethod
    def to_host(cls, averaged: Mapping[str, Tensor], copied: Mapping[str, Tensor]) -> "Taken":
        """Copies of the weights as they are now, on their way into host memory."""
        way = ToHost()
        sent = cls(way.copies(averaged), way.copies(copied), way)
        way.sent()
        return sent


@final
class Background:
    """One update at a time that is made in host memory while training goes on.

    Attributes:
        waited: Seconds that training has waited for one to be done, in all.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(1, "an average in host memory")
        self._future: Future[None] | None = None
        self._thread: int | None = None

    @property
    def is_busy(self) -> bool:
        """Whether an update is under way, and may be done by now."""
        return self._future is not None

    @property
    def is_here(self) -> bool:
        """Whether this is asked by the update itself."""
        return threading.get_ident() == self._thread

    def begin(self, update: Callable[[], None]) -> None:
        """Starts an update; the one before is finished."""

        def work() -> None:
            self._thread = threading.get_ident()
            update()

        self._future = self._pool.submit(work)

    def finish(self) -> None:
        """Waits for the update that is under way; what it raised is raised here."""
        future, self._future = self._future, None
        if future is not None:
            start = time.perf_counter()
            try:
                future.result()
            finally:
                self.waited += time.perf_counter() - start

    def close(self) -> None:
        """Lets go of the thread."""
        self._pool.shutdown()


def check_room(title: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises before training if an average, and weights on their way to it, do not fit into host memory.

    Raises:
        MemoryError: With the figures.
    """
    needed = 2 * weights.size_of(tensors)
    needs = (
        f"{title} with `device='cpu'` needs {needed:,} bytes of host memory, for the average and for weights on their"
        " way to it"
    )
    cure = "Leave `device` out, or average fewer tensors: `selection=`."
    weights.refuse_without_room(needed, weights.free_bytes(torch.device("cpu")), needs, cure)


def placed(nested: Any, on_host: bool) -> Any:
    """Weights in host memory if they belong there, else as they are."""
    return weights.to_devices(nested, torch.device("cpu")) if on_host else nested
