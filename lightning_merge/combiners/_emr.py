"""Elect, mask, rescale."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import one_of
from lightning_merge._mergeable import named
from lightning_merge.combiners._base import Combiner
from lightning_merge.combiners._kept import as_in
from lightning_merge.combiners._vectors import check_finite, check_vector
from lightning_merge.weights import State, Weights, add_, maximum_, minimum_, zeros


@final
@dataclass(frozen=True)
class EMR(Combiner):
    """One unified vector for all tasks, of which a mask and a factor make a vector for each task again.

    The unified vector ``u`` has per parameter the sign of ``sum_t v_t`` (0 counts as negative) and the largest
    magnitude among the values of that sign, 0 if there is none. Task t is served by ``base + c_t * m_t * u``: its mask
    ``m_t`` is where ``v_t * u > 0``, and ``c_t = sum |v_t| / sum |m_t * u|`` gives its magnitudes back (``for_task``).
    So one has to know the task of an input; what is kept for it besides ``u`` is a mask and a number. One task is that
    task.

    A stream is exact with three copies of the weights, whatever the number of tasks: the sum, and the largest and the
    smallest value. A mask belongs to one ``u``: after a further task it has to be made again from ``v_t``.

    Args:
        rescaler: Whether the sums of ``c_t`` are over the whole vector (``"vector"``, the paper), or each is the sum
            over tensors of their means, in which a bias counts like a matrix (``"tensor"``, one official script).

    Raises:
        ValueError: If ``rescaler`` is not one of these.

    Example:
        >>> vectors = [{"w": torch.tensor([4.0, 1.0])}, {"w": torch.tensor([2.0, -3.0])}]
        >>> unified = EMR().combine(vectors)
        >>> unified
        {'w': tensor([ 4., -3.])}
        >>> EMR().for_task(vectors[0], unified)
        {'w': tensor([5., -0.])}

    References:
        Huang et al., "EMR-Merging: tuning-free high-performance model merging", NeurIPS 2024.
    """

    rescaler: Literal["vector", "tensor"] = "vector"

    def __post_init__(self) -> None:
        one_of("rescaler", self.rescaler, ("vector", "tensor"), '"vector" or "tensor"')

    def init(self, like: Weights) -> State:
        return {"sum": zeros(like), "largest": zeros(like), "smallest": zeros(like), "updates": 0}

    @torch.no_grad()
    def _take(self, state: State, vector: Weights, task: int | str) -> None:
        wide = as_in(state["sum"], vector)
        add_(state["sum"], wide)
        maximum_(state["largest"], wide)
        minimum_(state["smallest"], wide)

    @torch.no_grad()
    def _merged(self, state: State) -> Weights | None:
        if not state["updates"]:
            return None
        return {
            name: torch.where(total > 0, state["largest"][name], state["smallest"][name])
            for name, total in state["sum"].items()
        }

    @torch.no_grad()
    def mask_of(self, vector: Mapping[str, Tensor], unified: Mapping[str, Tensor]) -> tuple[Weights, float]:
        """A task's mask, booleans in the vector's shapes, and its factor: 0 if the mask is empty.

        Args:
            vector: The task's vector.
            unified: What all vectors combine to.

        Raises:
            TypeError: If an argument is not named tensors.
            ValueError: If names or shapes differ, or the vector holds integers, a NaN or an infinity.
        """
        named("vector", vector)
        check_vector(dict(vector), dict(named("unified", unified)), "vector")
        check_finite(dict(vector), "vector")
        masks = {name: vector[name].detach().to(t).sign() * t.sign() > 0 for name, t in unified.items()}
        masked = self.size_of({name: tensor * masks[name] for name, tensor in unified.items()})
        return masks, self.size_of(vector) / masked if masked else 0.0

    def size_of(self, vector: Mapping[str, Tensor]) -> float:
        """The sum of magnitudes that the factor of a task gives back, in float64.

        Args:
            vector: The task's vector.
        """
        total = 0.0
        for tensor in vector.values():
            share = tensor.numel() if self.rescaler == "tensor" else 1
            if share:
                total += float(tensor.detach().abs().sum(dtype=torch.float64)) / share
        return total

    @torch.no_grad()
    def for_task(self, vector: Mapping[str, Tensor], unified: Mapping[str, Tensor]) -> Weights:
        """The vector that serves a task, ``c_t * m_t * u``: add it to the base.

        Args:
            vector: The task's vector.
            unified: What all vectors combine to.

        Raises:
            TypeError: If an argument is not named tensors.
            ValueError: If names or shapes differ, or the vector holds integers, a NaN or an infinity.
        """
        return self.for_signs(vector, self.size_of(named("vector", vector)), unified)

    @torch.no_grad()
    def for_signs(self, signs: Mapping[str, Tensor], size: float, unified: Mapping[str, Tensor]) -> Weights:
        """``for_task`` from what it takes of the vector, so that masks can be made again after a further task.

        Args:
            signs: Numbers with the signs of the task's vector.
            size: Its ``size_of``.
            unified: What all vectors combine to.

        Raises:
            TypeError: If an argument is not named tensors.
            ValueError: If names or shapes differ, or there are integers, a NaN or an infinity.
        """
        masks, _ = self.mask_of(signs, unified)
        kept = {name: tensor * masks[name] for name, tensor in unified.items()}
        masked = self.size_of(kept)
        return {name: tensor * (size / masked if masked else 0.0) for name, tensor in kept.items()}
