"""What a bank keeps of each task beside what is merged: statistics that it is weighed by, or signs that serve it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_merge.combiners import EMR, Combiner
from lightning_merge.combiners._with_statistics import WithStatistics
from lightning_merge.continual._bank_files import file_digest, put, write
from lightning_merge.importance import Statistics
from lightning_merge.weights import Weights

Entry = Mapping[str, Any]


def bound(
    combiner: Combiner, folder: Path, entries: Sequence[Entry], task: int | str = 0, new: Statistics | None = None
) -> Combiner:
    """The combiner with the statistics that were kept of these tasks, and those of one that is about to come.

    Raises:
        ValueError: If the combiner takes none, or none of their kind, or a file of them is no such file.
    """
    if not isinstance(combiner, WithStatistics):
        if new is not None:
            raise ValueError(f"`statistics` must be left out for {combiner!r}, which takes none.")
        return combiner
    kept: dict[Any, Any] = {each["task"]: folder / each["beside"]["file"] for each in entries if each.get("beside")}
    return combiner.knowing({**kept, **({} if new is None else {task: new})})


def keep_beside(
    combiner: Combiner, folder: Path, number: int, vector: Weights, statistics: Statistics | None
) -> dict[str, Any]:
    """Writes what is kept of a task beside the merge; what its entry says of it, nothing if there is none."""
    stem = f"beside-{number:04d}"
    if isinstance(combiner, EMR):
        name, digest = write(folder, stem, packed(vector, combiner))
    elif statistics is not None:
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / f"{stem}.part"
        statistics.write(part)
        digest = file_digest(part)
        name = f"{stem}-{digest[:16]}.safetensors"
        put(folder, part, folder / name)
    else:
        return {}
    return {"beside": {"file": name, "sha256": digest}}


def packed(vector: Weights, combiner: EMR) -> Weights:
    """A bit for each number of a vector, set where it is positive; where a tensor holds zeros, another for those."""
    bits = {f"positive/{name}": _packed(tensor > 0) for name, tensor in vector.items()}
    bits |= {f"zero/{name}": _packed(t == 0) for name, t in vector.items() if t.numel() and bool((t == 0).any())}
    return {**bits, "size": torch.tensor(combiner.size_of(vector), dtype=torch.float64)}


def served(bits: Weights, combiner: EMR, unified: Weights) -> Weights:
    """The vector that serves a task of which these bits were kept."""
    signs: Weights = {}
    for name, tensor in unified.items():
        positive = _unpacked(bits[f"positive/{name}"], tensor)
        signs[name] = (2 * positive - 1).to(tensor)
        if f"zero/{name}" in bits:
            signs[name] *= 1 - _unpacked(bits[f"zero/{name}"], tensor)
    return combiner.for_signs(signs, float(bits["size"]), unified)


_PLACES = 2 ** torch.arange(8, dtype=torch.uint8)


def _packed(mask: Tensor) -> Tensor:
    flat = mask.reshape(-1).to(torch.uint8)
    whole = torch.nn.functional.pad(flat, (0, -len(flat) % 8)).view(-1, 8)
    return (whole * _PLACES).sum(1, dtype=torch.uint8)


def _unpacked(found: Tensor, like: Tensor) -> Tensor:
    """Ones and zeros in the shape of a tensor."""
    bits = (found.unsqueeze(1) & _PLACES).ne(0).reshape(-1)[: like.numel()]
    return bits.view(like.shape).to(torch.int8)
