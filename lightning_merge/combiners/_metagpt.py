"""Mean of task vectors by their squared norms."""

from dataclasses import dataclass
from math import hypot
from typing import final

import torch

from lightning_merge.combiners._base import Combiner, Locality
from lightning_merge.weights import State, Weights, lerp_, norm, zeros


@final
@dataclass(frozen=True)
class MetaGPT(Combiner):
    """Mean of the vectors in proportion to their squared norms: ``sum_t |v_t|^2 v_t / sum_t |v_t|^2``.

    The coefficients that minimise a bound on the mean loss of the tasks, if each model is nearly linear around the base
    and vectors of different tasks are orthogonal. ``|v|`` is over all tensors of a vector, in float64. Equal vectors,
    and one task, come back as they are; vectors of one norm give the mean. A stream keeps the mean and a norm.

    Example:
        >>> import torch
        >>> MetaGPT().combine([{"w": torch.tensor([3.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}])
        {'w': tensor([2.7000, 0.1000])}

    References:
        Zhou et al., "MetaGPT: merging large language models using model exclusive task arithmetic", EMNLP 2024.
    """

    @property
    def locality(self) -> Locality:
        return "model"

    def init(self, like: Weights) -> State:
        return {"mean": zeros(like), "norm": 0.0, "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        new = norm(vector)
        together = hypot(state["norm"], new)
        if together:  # vectors of zeros have no share
            lerp_(state["mean"], vector, (new / together) ** 2)
        state["norm"] = together

    def _merged(self, state: State) -> Weights | None:
        return state["mean"] if state["updates"] else None
