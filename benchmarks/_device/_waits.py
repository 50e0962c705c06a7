"""How often the host waits for the device, and where."""

import contextlib
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lightning_merge.callbacks

CALLBACKS = Path(lightning_merge.callbacks.__file__).parent.resolve()
ENGINE = Path(lightning_merge.__file__).parent.resolve()


class Waits(contextlib.ExitStack):
    """Counts inside a ``with`` block: on CUDA by torch's debug mode; on a CPU scalars that are read stand for it.

    Attributes:
        count: All of them.
        ours: Those with a file of this library on the stack.
        sites: How many where.
    """

    def __init__(self, cuda: bool) -> None:
        super().__init__()
        self.cuda = cuda
        self.count, self.ours = 0, 0
        self.sites: Counter[str] = Counter()

    def __enter__(self) -> "Waits":
        if self.cuda:
            self.enter_context(warnings.catch_warnings())
            warnings.simplefilter("always")
            warnings.showwarning = self._warned
            torch.cuda.set_sync_debug_mode("warn")
            self.callback(torch.cuda.set_sync_debug_mode, "default")
        else:
            self.enter_context(_Scalars(self.note))
        return self

    def _warned(self, message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" in str(message):
            self.note()

    def note(self) -> None:
        """Counts one, for the innermost frame of this library, or else the innermost outside torch."""
        frame: FrameType | None = sys._getframe(1)
        site, ours = "", False
        while frame is not None and not ours:
            path = Path(frame.f_code.co_filename)
            ours = path.is_relative_to(CALLBACKS) or path.is_relative_to(ENGINE)
            passed_by = "torch" in path.parts or path.name in ("warnings.py", "_waits.py")
            if ours or not (site or passed_by):
                site = f"{path.name}:{frame.f_lineno}"
            frame = frame.f_back
        self.count += 1
        self.ours += ours
        self.sites[site] += 1


class _Scalars(TorchDispatchMode):
    def __init__(self, note: Callable[[], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            self._note()
        return func(*args, **(kwargs or {}))


def waits_of(function: Callable[[], Any], cuda: bool) -> int:
    """How often a call waits, once it is warm."""
    function()
    with Waits(cuda) as waits:
        function()
    return waits.count
