"""The figures that are taken from the matrix of accuracies of a stream of tasks.

``R[i][j]`` is the accuracy on task ``j`` after training task ``i``, NaN where it was not measured. Every figure leaves
the matrix as it is, counts the tasks trained so far (the last row with a value is now), and is NaN where it is not
defined.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, final

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from lightning_merge._checks import instance, one_of

Average = Literal["macro", "micro"]
Convention = Literal["chaudhry", "max_all", "initial"]


class OfMatrix(Metric, ABC):
    """A figure taken from a matrix of accuracies; the last one it was given counts."""

    full_state_update = True  # there is nothing to add up
    higher_is_better = True
    matrix: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("matrix", torch.full((0, 0), torch.nan), dist_reduce_fx=None)

    def update(self, matrix: Tensor) -> None:
        """Takes the matrix as it is now.

        Raises:
            ValueError: If it is not square.
        """
        instance("matrix", matrix, Tensor, "a tensor")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"`matrix` must be of shape (tasks, tasks), got {tuple(matrix.shape)}.")
        # Widened: a matrix of integers has no NaN.
        self.matrix = matrix.detach().to(torch.promote_types(matrix.dtype, torch.float32), copy=True)

    def compute(self) -> Tensor:
        """The figure; NaN if it is not defined yet."""
        if not (tasks := self.matrix.shape[-1]):  # there is no matrix yet
            return self.matrix.new_tensor(torch.nan)
        matrix = self.matrix.flatten()[: tasks**2].view(tasks, -1)  # of one process
        trained = _trained(matrix)
        return self._figure(matrix[:trained, :trained]) if trained else matrix.new_tensor(torch.nan)

    @abstractmethod
    def _figure(self, matrix: Tensor) -> Tensor:
        """The figure of a matrix of at least one task, all trained."""


class OfTasks(OfMatrix):
    """A mean over tasks, each of which counts alike or by its test samples."""

    sizes: Tensor | None

    def __init__(self, average: Average = "macro", sizes: Tensor | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_average(average, sizes)
        self.register_buffer("sizes", sizes, persistent=False)  # moved and cloned with the metric


@final
class FinalAverage(OfTasks):
    """``mean_j R[T-1][j]``: the mean accuracy over all tasks seen, now. ``micro`` weighs a task by its test samples.

    Args:
        average: ``"macro"`` or ``"micro"``.
        sizes: For ``"micro"``, and only for it: test samples per task, of shape (tasks,); tasks to come may be in it.

    Raises:
        ValueError: If ``average`` is neither, ``sizes`` does not go with it or is no row of counts, or later if it has
            fewer entries than tasks were trained.

    Example:
        >>> metric = FinalAverage()
        >>> metric(torch.tensor([[0.9, torch.nan], [0.7, 0.8]]))
        tensor(0.7500)
    """

    def _figure(self, matrix: Tensor) -> Tensor:
        return _mean_of_row(matrix, len(matrix) - 1, _of_tasks("sizes", self.sizes, matrix))


@final
class AverageIncremental(OfTasks):
    """``mean_i A_i`` with ``A_i = mean_{j<=i} R[i][j]``: the accuracy over the tasks seen, averaged over the stream.

    Args:
        average: ``"macro"`` or ``"micro"``, of each ``A_i``.
        sizes: For ``"micro"``, and only for it: test samples per task, of shape (tasks,); tasks to come may be in it.

    Raises:
        ValueError: If ``average`` is neither, ``sizes`` does not go with it or is no row of counts, or later if it has
            fewer entries than tasks were trained.
    """

    def _figure(self, matrix: Tensor) -> Tensor:
        sizes = _of_tasks("sizes", self.sizes, matrix)
        return torch.stack([_mean_of_row(matrix, i, sizes) for i in range(len(matrix))]).mean()


@final
class BackwardTransfer(OfMatrix):
    """``mean_{j<T-1} (R[T-1][j] - R[j][j])``: what later tasks did to earlier ones. Negative where they are forgotten.

    References:
        Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning", NeurIPS 2017, equation 3.
    """

    def _figure(self, matrix: Tensor) -> Tensor:
        return (matrix[-1, :-1] - matrix.diagonal()[:-1]).mean()


@final
class ForwardTransfer(OfMatrix):
    """``mean_{j>=1} (R[j-1][j] - b_j)``: accuracy on the next task before it is trained, over that of the base.

    NaN unless the matrix has the entries above its diagonal.

    Args:
        baseline: ``b``: accuracy of the untrained base on each task, of shape (tasks,); tasks to come may be in it.

    Raises:
        ValueError: If ``baseline`` is no row of numbers, or later if it has fewer entries than tasks were trained.

    References:
        Lopez-Paz and Ranzato, 2017, equation 4.
    """

    baseline: Tensor

    def __init__(self, baseline: Tensor, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        instance("baseline", baseline, Tensor, "a tensor of one accuracy per task")
        self.register_buffer("baseline", _row("baseline", baseline, "accuracy of the base"), persistent=False)

    def _figure(self, matrix: Tensor) -> Tensor:
        baseline: Tensor = _of_tasks("baseline", self.baseline, matrix)[1:]
        return (matrix.diagonal(1) - baseline.to(matrix)).mean()


@final
class Forgetting(OfMatrix):
    """``mean_{j<T-1} (best_j - R[T-1][j])``: how far earlier tasks are below their best.

    Args:
        convention: What ``best_j`` is. ``"chaudhry"``: the best of the rows before the last, so forgetting is negative
            where the last task helps. ``"max_all"``: the best of all rows, so it is at least 0 (Mammoth, PILOT).
            ``"initial"``: right after task ``j``, which makes it ``-BWT`` (Avalanche).

    Raises:
        ValueError: If ``convention`` is none of these.

    References:
        Chaudhry et al., "Riemannian walk for incremental learning", ECCV 2018, equation 3.
    """

    higher_is_better = False

    def __init__(self, convention: Convention = "chaudhry", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        one_of("convention", convention, Convention)
        self.convention = convention

    def _figure(self, matrix: Tensor) -> Tensor:
        if len(matrix) == 1:
            return matrix.new_tensor(torch.nan)
        if self.convention == "initial":
            best = matrix.diagonal()[:-1]
        else:
            rows = matrix if self.convention == "max_all" else matrix[:-1]
            best = rows[:, :-1].nan_to_num(nan=-torch.inf).amax(dim=0)  # entries that were not measured are no best
            best = best.masked_fill(best.isneginf(), torch.nan)  # and a task without any has none
        return (best - matrix[-1, :-1]).mean()


@final
class Plasticity(OfMatrix):
    """``mean_j R[j][j]``: accuracy on a task right after it was trained (learning accuracy)."""

    def _figure(self, matrix: Tensor) -> Tensor:
        return matrix.diagonal().mean()


@final
class Stability(OfMatrix):
    """``mean_{j<T-1} R[T-1][j]``: accuracy on the earlier tasks, now. Read it beside ``Plasticity``."""

    def _figure(self, matrix: Tensor) -> Tensor:
        return matrix[-1, :-1].mean()


def continual_metrics(baseline: Tensor | None = None) -> MetricCollection:
    """All figures of a matrix at once, under the names used in logs, tables and files.

    Args:
        baseline: Accuracy of the base on each task, for forward transfer; without it that figure is left out.

    Example:
        >>> matrix = torch.tensor([[0.9, torch.nan], [0.7, 0.8]])
        >>> {name: round(value.item(), 2) for name, value in continual_metrics()(matrix).items()}  # doctest: +ELLIPSIS
        {'average_incremental': 0.82, 'backward_transfer': -0.2, 'final_average': 0.75, 'forgetting': 0.2, ...
    """
    metrics: dict[str, Metric | MetricCollection] = {
        "final_average": FinalAverage(),
        "average_incremental": AverageIncremental(),
        "backward_transfer": BackwardTransfer(),
        "forgetting": Forgetting(),
        "forgetting_max_all": Forgetting("max_all"),
        "plasticity": Plasticity(),
        "stability": Stability(),
    }
    if baseline is not None:
        metrics["forward_transfer"] = ForwardTransfer(baseline)
    # Their states are equal, but what they compute is not cheap enough to share it.
    return MetricCollection(metrics, compute_groups=False)


def _trained(matrix: Tensor) -> int:
    """Tasks trained so far: up to the last row with a value."""
    rows = (~matrix.isnan()).any(dim=1).nonzero()
    return int(rows.max()) + 1 if rows.numel() else 0


def _mean_of_row(matrix: Tensor, row: int, sizes: Tensor | None) -> Tensor:
    seen = matrix[row, : row + 1]
    if sizes is None:
        return seen.mean()
    weights = sizes[: row + 1].to(seen)
    return (seen * weights).sum() / weights.sum()


def _row(name: str, given: Tensor, one: str) -> Tensor:
    if given.dim() != 1:
        raise ValueError(f"`{name}` must hold one {one} per task, of shape (tasks,), got shape {tuple(given.shape)}.")
    return given


def _of_tasks(name: str, given: Tensor | None, matrix: Tensor) -> Any:
    """The entries of the tasks trained so far."""
    if given is not None and len(given) < len(matrix):
        raise ValueError(
            f"`{name}` must have an entry for each of the {len(matrix)} tasks trained so far, got {len(given)}."
        )
    return None if given is None else given[: len(matrix)]


def _check_average(average: str, sizes: Tensor | None) -> None:
    one_of("average", average, Average)
    if sizes is not None:
        _row("sizes", instance("sizes", sizes, Tensor, "a tensor of the test samples per task"), "number of samples")
        if sizes.is_complex() or not bool((sizes >= 0).all()) or bool(sizes.isinf().any()):
            raise ValueError(f"`sizes` must be at least 0 and finite, got {sizes.tolist()}.")
    if (average == "micro") != (sizes is not None):
        need = "needs the test samples per task" if average == "micro" else "weighs all tasks alike"
        raise ValueError(f"`sizes` must be given for `average='micro'` only: {average!r} {need}, got {sizes}.")
