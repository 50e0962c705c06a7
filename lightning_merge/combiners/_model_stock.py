"""Model Stock."""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import one_of
from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.weights import State, Weights, add_, clone, zeros


@final
@dataclass(frozen=True)
class ModelStock(Combiner):
    """Per tensor ``t * mean``, ``t = n c / (1 + (n - 1) c)``, with ``c`` the mean cosine between the n vectors.

    Made for several runs on one task: the more their vectors agree, the less is gone back to the base. Vectors of
    different tasks are nearly orthogonal, which brings the result close to the base itself. ``t`` is kept in [0, 1];
    a single vector is taken as it is. The mean cosine follows from the sum of the normalised vectors, so the stream
    is exact with two sums, whatever the number of vectors.

    Args:
        stock_angle: ``"mean_cos"`` averages the cosines of all pairs (mergekit); ``"mean_deg"`` averages their angles
            (FusionBench), for which the state has to hold every vector. With two vectors they are the same.

    Raises:
        ValueError: If ``stock_angle`` is not one of these.

    Example:
        >>> ModelStock().combine([{"w": torch.tensor([1.0, 0.0, 1.0, 1.0])}, {"w": torch.tensor([1.0, 1.0, 0.0, 1.0])}])
        {'w': tensor([0.8000, 0.4000, 0.4000, 0.8000])}

    References:
        Jang, Yun, and Han, "Model Stock: all we need is just a few fine-tuned models", ECCV 2024, equation 2.
    """

    stock_angle: Literal["mean_cos", "mean_deg"] = "mean_cos"

    def __post_init__(self) -> None:
        one_of("stock_angle", self.stock_angle, ("mean_cos", "mean_deg"), '"mean_cos" or "mean_deg"')

    @property
    def needs_every_vector(self) -> bool:
        return self.stock_angle == "mean_deg"

    @property
    def locality(self) -> Locality:
        return "tensor"

    def init(self, like: Weights) -> State:
        if self.needs_every_vector:
            return {"sum": zeros(like), "vectors": [], "updates": 0}
        # Zero vectors have no direction: how many have one is counted per tensor.
        directed = {name: torch.zeros((), dtype=torch.int64, device=t.device) for name, t in like.items()}
        return {"sum": zeros(like), "directions": zeros(like), "directed": directed, "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        add_(state["sum"], vector)
        if self.needs_every_vector:
            state["vectors"].append(clone(vector))
            return
        for name, total in state["directions"].items():
            direction = _direction(vector[name].to(total))
            total += direction
            state["directed"][name] += direction.any()

    @torch.no_grad()
    def _merged(self, state: State) -> Weights | None:
        count = state["updates"]
        if not count:
            return None
        return {name: total * (self._share(state, name) / count) for name, total in state["sum"].items()}

    def _share(self, state: State, name: str) -> float:
        """How far to go from the base to the mean."""
        count: int = state["updates"]
        if count == 1:
            return 1.0
        cosine = self._mean_angle(state, name) if self.needs_every_vector else self._mean_cosine(state, name)
        if cosine <= 0:
            return 0.0
        return min(count * cosine / (1 + (count - 1) * cosine), 1.0)

    def _mean_cosine(self, state: State, name: str) -> float:
        # The squared norm of a sum holds every pair twice, and each direction once with itself.
        count: int = state["updates"]
        pairs = float(state["directions"][name].double().square().sum() - state["directed"][name])
        return pairs / (count * (count - 1))

    def _mean_angle(self, state: State, name: str) -> float:
        directions = [_direction(vector[name].double()) for vector in state["vectors"]]
        cosines = torch.stack([(a * b).sum() for a, b in combinations(directions, 2)])
        return float(cosines.clamp(-1, 1).arccos().mean().cos())


def _direction(tensor: Tensor) -> Tensor:
    norm = tensor.norm()
    if tensor.numel() and not 1e-15 < float(norm) < 1e15:  # squares of what is large or small leave float32
        tensor = tensor / tensor.abs().max().clamp(min=torch.finfo(tensor.dtype).tiny)
        norm = tensor.norm()
    return torch.where(norm > 0, tensor / norm, 0.0)
