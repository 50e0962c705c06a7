"""Room for copies of weights: asked for before anything is allocated."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lightning_merge.weights._precision import average_dtype
from lightning_merge.weights._shards import local


def size_of(weights: Mapping[str, Tensor]) -> int:
    """Bytes of one copy in the precision of averages; of a sharded tensor the part that is here."""
    return sum(t.numel() * average_dtype(t).itemsize for t in local(weights).values())


def free_bytes(device: torch.device) -> int | None:
    """Bytes that can still be allocated; ``None`` where that cannot be known."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def refuse_without_room(needed: int, free: int | None, needs: str, cure: str) -> None:
    """Raises if there are fewer bytes than needed; where it is not known how many there are, it does not.

    Args:
        needed: Bytes.
        free: Bytes that can still be allocated.
        needs: The begin of the error: what needs how many bytes where.
        cure: What to do about it, as a sentence.

    Raises:
        MemoryError: With the figures.
    """
    if free is not None and needed > free:
        raise MemoryError(f"{needs}, and {free:,} are available. {cure}")
