"""What collectives send, as formulas that benchmarks share, and a mode that counts it.

Bytes are those that one process sends, by the algorithms that need the least: a ring for an all-reduce, and straight
to each other process else.
"""

import math
from collections.abc import Iterable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

FLOAT = 4
BLOCK, SCALE = 256, 4
"""Numbers that share a scale in 8 or 4 bits, and its bytes."""


def all_reduce(bytes_: float, processes: int) -> float:
    return 2 * (processes - 1) / processes * bytes_


def all_gather(part: float, processes: int) -> float:
    return (processes - 1) * part


def all_to_all(bytes_: float, processes: int) -> float:
    return (processes - 1) / processes * bytes_


def reduce_scatter(bytes_: float, processes: int) -> float:
    return (processes - 1) / processes * bytes_


def mean(sizes: Iterable[int], bits: int, processes: int) -> float:
    """Of tensors of these many numbers, in 32 bits by one all-reduce, else there and back in few."""
    if bits == 32:
        return all_reduce(FLOAT * sum(sizes), processes)
    rows = math.ceil(sum(math.ceil(size / BLOCK) for size in sizes) / processes) * processes
    sent = rows * (BLOCK * bits // 8 + SCALE)
    return all_to_all(sent, processes) + all_gather(sent / processes, processes)


class Sent(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what this process sends while it is on.

    Attributes:
        bytes: Of each collective, in their order.
    """

    def __init__(self, processes: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: list[float] = []
        self._processes = processes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            self._count(func.__name__.split(".")[0].strip("_"), args)
        return func(*args, **(kwargs or {}))

    def _count(self, name: str, args: Any) -> None:
        if name == "allreduce":
            self.bytes.append(all_reduce(_bytes(args[0]), self._processes))
        elif name in ("alltoall_base", "alltoall"):
            self.bytes.append(all_to_all(_bytes(args[1]), self._processes))
        elif name in ("allgather", "allgather_base"):
            self.bytes.append(all_gather(_bytes(args[1]), self._processes))
        elif name == "broadcast":
            self.bytes.append(_bytes(args[0]))
        elif name in ("reduce_scatter_base", "reduce_scatter_tensor_coalesced"):
            self.bytes.append(reduce_scatter(_bytes(args[1]), self._processes))
        elif name not in ("barrier", "monitored_barrier"):
            raise NotImplementedError(f"the bytes of {name} are not counted")


def _bytes(value: Any) -> int:
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else value.nbytes
