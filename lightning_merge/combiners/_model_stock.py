"""Model Stock."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import one_of
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.combiners._kept import as_in
from lightning_merge.weights import State, Weights, add_, clone, matrices, rows, unstacked, worth_it, zeros


@final
@dataclass(frozen=True)
class ModelStock(Combiner):
    """Per tensor or row ``t * mean``, ``t = n c / (1 + (n - 1) c)``, with ``c`` the mean cosine between the n vectors.

    Made for several runs on one task: the more their vectors agree, the less is gone back to the base. Vectors of
    different tasks are nearly orthogonal, which brings the result close to the base itself. ``t`` is kept in [0, 1];
    a single vector is taken as it is. The mean cosine follows from the sum of the normalised vectors, so the stream
    is exact with two sums, whatever the number of vectors.

    Args:
        stock_angle: ``"mean_cos"`` averages the cosines of all pairs (mergekit); ``"mean_deg"`` averages their angles
            (FusionBench), for which the state has to hold every vector. With two vectors they are the same.
        scope: Whether there is an angle for each ``"tensor"``, or for each ``"row"``: what makes one output
            (``filter_wise`` of mergekit). What has one dimension is a single row.

    Raises:
        ValueError: If ``stock_angle`` or ``scope`` is not one of these.

    Example:
        >>> ModelStock().combine([{"w": torch.tensor([1.0, 0.0, 1.0, 1.0])}, {"w": torch.tensor([1.0, 1.0, 0.0, 1.0])}])
        {'w': tensor([0.8000, 0.4000, 0.4000, 0.8000])}

    References:
        Jang, Yun, and Han, "Model Stock: all we need is just a few fine-tuned models", ECCV 2024, equation 2.
    """

    stock_angle: Literal["mean_cos", "mean_deg"] = "mean_cos"
    scope: Literal["tensor", "row"] = "tensor"

    def __post_init__(self) -> None:
        one_of("stock_angle", self.stock_angle, ("mean_cos", "mean_deg"), '"mean_cos" or "mean_deg"')
        one_of("scope", self.scope, ("tensor", "row"))

    @property
    def needs_every_vector(self) -> bool:
        return self.stock_angle == "mean_deg"

    @property
    def locality(self) -> Locality:
        return "tensor"

    def init(self, like: Weights) -> State:
        if self.needs_every_vector:
            return {"sum": zeros(like), "vectors": [], "updates": 0}
        # Zero vectors have no direction: how many have one is counted per tensor or row.
        directed = {n: torch.zeros(self._rows_of(t), dtype=torch.int64, device=t.device) for n, t in like.items()}
        return {"sum": zeros(like), "directions": zeros(like), "directed": directed, "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        add_(state["sum"], vector)
        if self.needs_every_vector:
            state["vectors"].append(clone(vector))
            return
        for names, matrix in self._matrices(as_in(state["directions"], vector)):
            found = _directions(matrix)
            add_({name: state["directions"][name] for name in names}, unstacked(found, names, vector))
            own = {name: state["directed"][name] for name in names}
            add_(own, unstacked(found.any(1).to(torch.int64), names, own), 1)

    @torch.no_grad()
    def _merged(self, state: State) -> Weights | None:
        count = state["updates"]
        if not count:
            return None
        merged: Weights = {}
        for names, total in self._matrices(state["sum"]):
            merged |= unstacked(total * (self._shares(state, names) / count).to(total), names, state["sum"])
        return {name: merged[name] for name in state["sum"]}

    def _matrices(self, weights: Weights) -> Iterator[tuple[list[str], Tensor]]:
        return rows(weights) if self.scope == "tensor" else matrices(weights, first=True)

    def _rows_of(self, tensor: Tensor) -> tuple[int, ...]:
        return tensor.shape[:1] if self.scope == "row" and tensor.ndim > 1 else ()

    def _whole(self, weights: Weights, names: list[str]) -> Tensor:
        """Tensors of one group as the rows of a matrix."""
        ((_, matrix),) = self._matrices({name: weights[name] for name in names})
        return matrix

    def _shares(self, state: State, names: list[str]) -> Tensor:
        """How far to go from the base to the mean: a column with a number for each row."""
        count: int = state["updates"]
        if count == 1:
            return torch.ones(1, 1, dtype=torch.float64)
        cosine = (self._mean_angles if self.needs_every_vector else self._mean_cosines)(state, names).clamp(min=0.0)
        return (count * cosine / (1 + (count - 1) * cosine)).clamp(max=1.0)

    def _mean_cosines(self, state: State, names: list[str]) -> Tensor:
        # The squared norm of a sum holds every pair twice, and each direction once with itself.
        count: int = state["updates"]
        squares = self._whole(state["directions"], names).double().square().sum(1, keepdim=True)
        directed = torch.cat([state["directed"][name].view(-1, 1) for name in names])
        return (squares - directed) / (count * (count - 1))

    def _mean_angles(self, state: State, names: list[str]) -> Tensor:
        directions = [_directions(self._whole(vector, names).double()) for vector in state["vectors"]]
        cosines = torch.stack([(a * b).sum(1, keepdim=True) for a, b in combinations(directions, 2)])
        return cosines.clamp(-1, 1).arccos().mean(0).cos()


def _directions(matrix: Tensor) -> Tensor:
    """Each row divided by its norm; a row of zeros as it is."""
    size = matrix.norm(dim=1, keepdim=True)
    extreme = (size <= 1e-15) | (size >= 1e15)
    if matrix.shape[1] and worth_it(extreme):  # squares of what is large or small leave float32
        largest = matrix.abs().amax(1, keepdim=True).clamp(min=torch.finfo(matrix.dtype).tiny)
        matrix = torch.where(extreme, matrix / largest, matrix)
        size = matrix.norm(dim=1, keepdim=True)
    return torch.where(size > 0, matrix / size, 0.0)
