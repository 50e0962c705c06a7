"""Task singular vectors."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge._checks import settle
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.combiners._scale import Scale, checked_scale, scale_of
from lightning_merge.combiners._spectrum import decomposed, has_spectrum, polar
from lightning_merge.weights import State, Weights, zeros


@final
@dataclass(frozen=True)
class TSVM(Combiner):
    """Per matrix the leading singular vectors of every task, made orthogonal to those of the others.

    Of T vectors ``v_t = U_t S_t V_t^T``, matrices (m, n), each gives its ``k = min(m, n) // T`` largest singular
    values, at least one. Side by side they are ``U`` (m, T k), ``S`` (T k) and ``V`` (n, T k), and the result is
    ``scale * polar(U) S polar(V)^T``, with ``polar(A) = P Q^T`` of ``A = P D Q^T`` the nearest matrix with orthonormal
    columns. Of tensors of other than two dimensions the result is ``scale *`` their mean. One task at scale 1 is that
    task. Where tasks share a singular vector, ``polar`` is not unique: shared directions are counted once, and nothing
    is added where no task has a part.

    The share of a task only shrinks as tasks come, so a stream is exact without the vectors: it keeps the leading
    values and vectors of each, together at most ``1 + (m + n) / max(m, n)`` copies of a matrix, whatever the number of
    tasks (more once there are more tasks than ``min(m, n)``). A singular value decomposition per matrix and task, and
    two per matrix and result.

    Args:
        scale: In ``(0, 10]``, or shrinking with the number of tasks (``Sum``).

    Raises:
        ValueError: If ``scale`` is outside its range.

    Example:
        >>> first, second = torch.diag(torch.tensor([3.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))
        >>> TSVM().combine([{"w": first}, {"w": second}])
        {'w': tensor([[3., 0.],
                [0., 1.]])}

    References:
        Gargiulo et al., "Task singular vectors: reducing task interference in model merging", CVPR 2025.
    """

    scale: Scale = 1.0

    def __post_init__(self) -> None:
        settle(self, scale=checked_scale(self.scale))

    @property
    def locality(self) -> Locality:
        return "tensor"

    def init(self, like: Weights) -> State:
        sums = zeros(like)
        left = {name: t.new_zeros((len(t), 0) if has_spectrum(t) else (0,)) for name, t in sums.items()}
        values = {name: t.new_zeros((0,)) for name, t in sums.items()}
        right = {name: t.new_zeros((0, t.shape[1]) if has_spectrum(t) else (0,)) for name, t in sums.items()}
        return {"sum": sums, "left": left, "values": values, "right": right, "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        tasks = state["updates"]
        for name, total in state["sum"].items():
            new = vector[name].detach().to(total)
            if not has_spectrum(new):
                total.add_(new)
                continue
            share = max(1, min(new.shape) // (tasks + 1))
            left, values, right = decomposed(new)
            state["left"][name] = _with(state["left"][name].T, left.T, tasks, share).T.contiguous()
            state["values"][name] = _with(state["values"][name], values, tasks, share)
            state["right"][name] = _with(state["right"][name], right, tasks, share)

    @torch.no_grad()
    def _merged(self, state: State) -> Weights | None:
        count = state["updates"]
        if not count:
            return None
        factor = scale_of(self.scale, count)
        merged: Weights = {}
        for name, total in state["sum"].items():
            if has_spectrum(total):
                left, values, right = (state[key][name] for key in ("left", "values", "right"))
                merged[name] = factor * (polar(left) * values) @ polar(right)
            else:
                merged[name] = total * (factor / count)
        return merged


def _with(kept: Tensor, new: Tensor, tasks: int, share: int) -> Tensor:
    """The first rows of each task's block, and those of a further one."""
    blocks = [block[:share] for block in kept.tensor_split(tasks)] if tasks else []
    return torch.cat([*blocks, new[:share]])
