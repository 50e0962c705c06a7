"""The matrix of accuracies that a stream of tasks is judged by."""

from typing import Any, final

import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_merge._checks import instance, whole

_MOST = 10_000
"""Tasks of a stream: their number squared is kept."""


@final
class AccuracyMatrix(Metric):
    """``R[i][j]``: share of task ``j``'s test samples that the model gets right after task ``i``.

    Counts are summed over processes, so it is exact under DDP.

    Args:
        tasks: Length of the stream, in tasks; at least 1.

    Raises:
        ValueError: If ``tasks`` is less than 1, or an index of ``update`` is not one of the tasks.

    Example:
        >>> matrix = AccuracyMatrix(tasks=2)
        >>> matrix.update(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 1]), after=0, task=0)
        >>> matrix.compute()
        tensor([[0.7500,    nan],
                [   nan,    nan]])
    """

    full_state_update = False
    right: Tensor
    samples: Tensor

    def __init__(self, tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tasks = tasks = whole("tasks", tasks, 1, _MOST)
        for name in ("right", "samples"):
            self.add_state(name, torch.zeros(tasks, tasks, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, predictions: Tensor, labels: Tensor, after: int, task: int) -> None:
        """Counts a batch of task ``task`` predicted after training task ``after``.

        Args:
            predictions: Classes of shape (N,), or logits of shape (N, C).
            labels: Of shape (N,).
            after: Index of the task trained last, from 0.
            task: Index of the task that the batch is of, from 0.
        """
        for name, index in (("after", after), ("task", task)):
            if not 0 <= whole(name, index) < self.tasks:
                raise ValueError(f"`{name}` must be in [0, {self.tasks}), got {index}.")
        for name, given in (("predictions", predictions), ("labels", labels)):
            instance(name, given, Tensor, "a tensor")
        classes = predictions.argmax(dim=1) if predictions.dim() == 2 else predictions
        if classes.dim() != 1 or classes.shape != labels.shape:
            raise ValueError(
                "`predictions` must be of shape (N,) or (N, C) and `labels` of shape (N,), got"
                f" {tuple(predictions.shape)} and {tuple(labels.shape)}."
            )
        self.right[after, task] += (classes == labels).sum()
        self.samples[after, task] += labels.numel()

    def compute(self) -> Tensor:
        """The matrix of shape (tasks, tasks); NaN where nothing was measured."""
        return torch.where(self.samples > 0, self.right / self.samples, torch.nan)

    def sizes(self) -> Tensor:
        """Test samples of each task, of shape (tasks,); of all processes."""
        with self.sync_context(should_sync=not self._is_synced):
            return self.samples.amax(dim=0)
