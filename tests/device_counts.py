"""Counts what a GPU would be asked to do, without one: fake CUDA tensors under a dispatch mode, or tensors on a CPU.

Fake tensors have a device and a shape and no numbers. What is read back of them is answered so that nothing is found:
all are finite, none is as large as another.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2", "bincount"}
NOTHING = {
    "empty",
    "empty_like",
    "empty_strided",
    "detach",
    "alias",
    "lift_fresh",
    "_unsafe_view",
    "device",
    "new_empty",
}
"""Operations that launch nothing, besides views."""


class Counts(TorchDispatchMode):
    """Operations on a device, and reads of it that the host waits for, from here to the end of the ``with`` block.

    Args:
        cpu: Whether to take the CPU for the device: counts what is done to all tensors.

    Attributes:
        launches: Names of operations that launch a kernel; a ``_foreach_`` operation is one.
        reads: Names of operations whose answer the host needs.
    """

    def __init__(self, cpu: bool = False) -> None:
        super().__init__()
        self.cpu = cpu
        self.launches: list[str] = []
        self.reads: list[str] = []

    def restart(self) -> None:
        """Forgets what was counted."""
        self.launches.clear()
        self.reads.clear()

    def tolist(self, tensor: Tensor) -> Any:
        """A list, from one read; ``FakeTensor.tolist`` reads the elements one by one."""
        self.reads.append("tolist")
        return [1.0] * tensor.numel()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        there = self.cpu or _touches_a_device((args, kwargs))
        indexed = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if there and (name in READS or indexed):
            self.reads.append(name)
            if name == "_local_scalar_dense" and not self.cpu:
                return _answer(args[0])
        result = func(*args, **kwargs)
        if name in ("_to_copy", "copy_") and there and result.device.type == "cpu" and not self.cpu:
            self.reads.append(name)
        elif (there or _touches_a_device(result)) and name not in NOTHING and not func.is_view:
            self.launches.append(name)
        if isinstance(result, Tensor):
            result.made_by = name  # type: ignore[attr-defined]
        return result


def _touches_a_device(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.device.type != "cpu"
    if isinstance(value, dict):
        return any(map(_touches_a_device, value.values()))
    return isinstance(value, list | tuple) and any(map(_touches_a_device, value))


def _answer(tensor: Tensor) -> Any:
    if tensor.dtype == torch.bool:
        return getattr(tensor, "made_by", "") != "any"
    return 1.0 if tensor.dtype.is_floating_point else 1


@contextmanager
def fake_cuda() -> Iterator[Counts]:
    """Counts on tensors that are made inside on ``device="cuda"``, without a GPU."""
    # Fake tensors are a class of their own, and are to be taken for plain ones here.
    plain = patch("lightning_merge.weights._precision._is_plain", lambda tensor: True)
    with plain, FakeTensorMode(), Counts() as counts, patch.object(FakeTensor, "tolist", lambda t: counts.tolist(t)):
        yield counts
