"""Regression mean."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from lightning_merge._checks import number, settle
from lightning_merge.combiners._grams import Normalise, WithGrams
from lightning_merge.combiners._with_statistics import Known
from lightning_merge.importance import Statistics
from lightning_merge.weights import State


@final
@dataclass(frozen=True)
class RegMean(WithGrams):
    """Per linear layer the weight whose outputs are nearest to each model's on its own data.

    That is ``(sum_t V_t G_t) (sum_t G_t)^-1`` with ``V_t`` the vector of a weight, flattened to (out, d), and ``G_t``
    the mean of ``x x^T`` over the layer's inputs (statistics of kind ``"gram"``), (d, d), with off-diagonal entries
    times ``off_diagonal`` and ``ridge`` times the mean of the diagonal added to it. One task is that task, and equal
    matrices give the mean. Tensors that no task has a Gram matrix of (biases, norms, embeddings, what was left out) are
    the plain mean (``without`` lists them).

    A stream is exact with a copy of the weights and d^2 numbers per layer, whatever the number of tasks, and takes
    vectors out again. A Cholesky decomposition in float64 per layer and result.

    Args:
        statistics: Statistics of each task by its label, or the path of their file. In files and lists labels are 0, 1,
            2, ... unless others are given.
        off_diagonal: In ``[0, 1]``; 0.9 for most models in the paper, 0.1 for some. Below 1 the matrices have full rank
            as soon as every input is used.
        ridge: At least 0. It keeps inputs that are always 0 at the plain mean.
        normalise: Whether ``G_t`` is divided by the 2-norm of its ``"tensor"``, or of all in the ``"model"``, so that
            no model counts more since its activations are larger; not by default, as in the paper.

    Raises:
        TypeError: If ``statistics`` is no mapping from tasks to statistics or paths.
        ValueError: If a value is outside its range, a file holds no statistics of such a kind, or they hold a NaN or
            are all zero; at an update if they are of another model, or missing for this task; at the result if the
            matrices together have no full rank.

    Example:
        >>> def gram(*values: float) -> Statistics:
        ...     return Statistics("gram", {"w": torch.diag(torch.tensor(values))})
        >>> regmean = RegMean({0: gram(1.0, 1.0), 1: gram(3.0, 1.0)}, ridge=0.0)
        >>> regmean.combine([{"w": torch.zeros(1, 2)}, {"w": torch.tensor([[4.0, 4.0]])}])
        {'w': tensor([[3., 2.]])}

    References:
        Jin et al., "Dataless knowledge fusion by merging weights of language models", ICLR 2023, equation 3.
    """

    statistics: Known  # type: ignore[assignment]
    off_diagonal: float = 0.9
    ridge: float = 1e-6
    normalise: Normalise = None

    def __post_init__(self) -> None:
        super().__post_init__()
        settle(self, ridge=number("ridge", self.ridge, "[0, inf)"))

    def _gram(self, statistics: Statistics, name: str, like: Tensor) -> Tensor:
        gram = super()._gram(statistics, name, like)
        gram.diagonal().add_(self.ridge * gram.diagonal().mean())
        return gram

    def _solved(self, name: str, gram: Tensor, moved: Tensor, state: State) -> Tensor:
        factor, failed = torch.linalg.cholesky_ex(gram.double())
        # A pivot is what is left of an input that those before it do not give.
        rest = factor.diagonal().square() - gram.diagonal().double() * (len(gram) * torch.finfo(gram.dtype).eps)
        if bool(failed) or not bool((rest > 0).all()):
            raise ValueError(
                f"the Gram matrices of `{name}` together have no full rank: some inputs are always 0, or follow from"
                f" others. Raise `ridge`, which is {self.ridge:g}, or lower `off_diagonal`, which is"
                f" {self.off_diagonal:g}; or measure more samples."
            )
        # In two halves, which copy no factor: of a layer of 3072 inputs it takes 75 MB.
        half = torch.linalg.solve_triangular(factor, moved.double().T, upper=False)
        solved: Tensor = torch.linalg.solve_triangular(factor.T, half, upper=True)
        return solved.T.to(moved)
