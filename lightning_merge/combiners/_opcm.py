"""Orthogonal projection for continual merging."""

from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import number, one_of, settle
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.weights import State, Weights, largest, zeros


@final
@dataclass(frozen=True)
class OPCM(Combiner):
    """Adds the part of each vector that is orthogonal to what is merged, and keeps the norm of one task.

    ``raw = factor * merged + project(v)``; then ``merged = raw * n / |raw|`` and ``factor = |raw| / n``, with ``n`` the
    mean norm of the vectors so far. The projection is per matrix (tensors of two dimensions; others are added as
    they are): with ``merged = U S V^T``, it sets to zero the diagonal of ``U^T v V`` and its block of the first r rows
    and columns, the directions that hold a share ``alpha`` of the singular values. Made for models trained
    independently from the base; the order of the tasks matters. A singular value decomposition per matrix and task.

    Args:
        alpha: Share of the sum of singular values that is protected, in ``[0, 1]``.
        opcm_rank: r is the number of values needed to reach ``alpha``, all of them at 1 (``"fixed"``), or one less and
            none at 1, as in the official code (``"compat"``).

    Raises:
        ValueError: If a value is outside its range.

    Example:
        >>> first, second = torch.diag(torch.tensor([4.0, 3.0])), torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> OPCM(alpha=0.5).combine([{"w": first}, {"w": second}])
        {'w': tensor([[2.7667, 1.3833],
                [0.0000, 2.0750]])}

    References:
        Tang et al., "Merging models on the fly without retraining: a sequential approach to scalable continual model
        merging", NeurIPS 2025, section 4.
    """

    alpha: float = 0.5
    opcm_rank: Literal["compat", "fixed"] = "compat"

    def __post_init__(self) -> None:
        settle(self, alpha=number("alpha", self.alpha, "[0, 1]"))
        one_of("opcm_rank", self.opcm_rank, ("compat", "fixed"), '"compat" or "fixed"')

    @property
    def locality(self) -> Locality:
        return "model"

    def init(self, like: Weights) -> State:
        return {"merged": zeros(like), "factor": 1.0, "norms": 0.0, "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        merged: Weights = state["merged"]
        sizes = largest({name: kept for name, kept in merged.items() if kept.ndim == 2})
        for name, kept in merged.items():
            new = vector[name].to(kept)
            if sizes.get(name):  # zeros have no directions to protect
                new = self._project(new, kept)
            kept.mul_(state["factor"]).add_(new)
        state["norms"] += _norm(vector)
        mean_norm = state["norms"] / (state["updates"] + 1)
        raw_norm = _norm(merged)
        state["factor"] = raw_norm / mean_norm if raw_norm else 1.0
        for kept in merged.values():
            kept.div_(state["factor"])

    def _project(self, new: Tensor, merged: Tensor) -> Tensor:
        u, values, vt = torch.linalg.svd(merged, full_matrices=False)
        inside = u.T @ new @ vt.T
        protected = torch.eye(len(values), dtype=torch.bool, device=inside.device)
        leading = torch.arange(len(values), device=inside.device) < self._rank(values)
        projected: Tensor = new - u @ (inside * (protected | (leading[:, None] & leading))) @ vt
        return projected

    def _rank(self, values: Tensor) -> Tensor:
        total = values.sum()
        if self.opcm_rank == "compat":
            exceeds = values.cumsum(0) / total > self.alpha
            return exceeds.int().argmax()
        if self.alpha == 1.0:
            return torch.full_like(total, len(values))
        before = values.cumsum(0) - values
        return (before < (self.alpha * total.double()).to(values.dtype)).sum()

    def _merged(self, state: State) -> Weights | None:
        return state["merged"] if state["updates"] else None


def _norm(weights: Weights) -> float:
    """Euclidean norm over all tensors, summed in float64 and by name: rounding follows the order of a sum."""
    tensors = [weights[name] for name in sorted(weights)]
    squares = [torch.linalg.vector_norm(t, dtype=torch.float64).square() for t in tensors if t.numel()]
    return float(torch.stack(squares).sum().sqrt()) if squares else 0.0
