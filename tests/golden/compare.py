"""How what is found is compared with what was recorded."""

from typing import Any

import torch
from torch import Tensor

LATE = ("lookaround", "forkmerge", "wash", "dart", "branches")
"""Averages whose BatchNorm statistics are not in their states, but measured again before they are published."""


def loaded(standing: dict[str, Any]) -> dict[str, Any]:
    """What must be in place as soon as a file is loaded."""
    late = ("running_mean", "running_var")
    return {
        "module": standing["module"],
        "averages": {
            name: held
            | {"merged": {k: t for k, t in held["merged"].items() if name not in LATE or not k.endswith(late)}}
            for name, held in standing["averages"].items()
        },
    }


def sets_in(inspected: str) -> dict[str, str]:
    """The sets that `inspect` lists, with what it says of each."""
    lines = inspected.splitlines()
    if "  weight sets:" not in lines:
        return {}
    rows = lines[lines.index("  weight sets:") + 1 :]
    listed = [row.split(maxsplit=1) for row in rows if row.startswith("    ")]
    return dict(listed)


def differing(left: Any, right: Any, exact: bool = True, where: str = "") -> list[str]:
    """Where two nested results are not the same: bit for bit, or to 1e-6."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        same = torch.equal(left, right) if exact else torch.allclose(left, right, rtol=1e-6, atol=1e-6)
        return [] if same and left.dtype == right.dtype else [where]
    if isinstance(left, dict) and isinstance(right, dict):
        missing = [f"{where}.{key}" for key in left.keys() ^ right.keys()]
        return missing + [
            d for k in left.keys() & right.keys() for d in differing(left[k], right[k], exact, f"{where}.{k}")
        ]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [d for i, (a, b) in pairs for d in differing(a, b, exact, f"{where}[{i}]")]
    return [] if type(left) is type(right) and left == right else [where]
