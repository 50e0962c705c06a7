"""Which classes are in which task of a stream."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import LISTED, one_of, sequence, settle, whole
from lightning_merge._checks import seed as checked_seed
from lightning_merge.continual._heads import checked_classes

Scenario = Literal["class", "task"]


@final
@dataclass(frozen=True)
class Split:
    """Classes dealt to tasks; no class is in two of them. It is its own record: printed, compared, written as JSON.

    Args:
        tasks: The classes of each task, in the order of the stream; one class at least in each.
        scenario: What the model may choose among at test: ``"class"`` (class-incremental) all classes seen so far,
            ``"task"`` (task-incremental, the task is told) those of the sample's task.
        seed: What shuffled the classes, for the record; ``None`` if they were not.

    Raises:
        ValueError: If a class is in two tasks, a task is empty, or ``scenario`` is unknown.

    Example:
        >>> Split.of(10, tasks=5, seed=None)
        Split(tasks=((0, 1), (2, 3), (4, 5), (6, 7), (8, 9)), scenario='class', seed=None)
    """

    tasks: tuple[tuple[int, ...], ...]
    scenario: Scenario = "class"
    seed: int | None = None

    def __post_init__(self) -> None:
        says = "the classes of each task"
        tasks = [sequence("tasks", classes, says) for classes in sequence("tasks", self.tasks, says)]
        settle(self, tasks=tuple(tuple(whole("tasks", each) for each in classes) for classes in tasks))
        one_of("scenario", self.scenario, Scenario)
        settle(self, seed=None if self.seed is None else checked_seed("seed", self.seed))
        if not self.tasks:
            raise ValueError("`tasks` must hold at least one task, got none.")
        owner: dict[int, int] = {}
        for index, classes in enumerate(self.tasks):
            if not classes:
                raise ValueError(f"`tasks` must each hold at least one class, got none in task {index}.")
            for each in classes:
                if each in owner:
                    raise ValueError(
                        f"`tasks` must not overlap in a class-incremental split, but class {each} is in task"
                        f" {owner[each]} and task {index}. For the same classes in every task use a domain-incremental"
                        " stream."
                    )
                owner[each] = index

    @classmethod
    def of(
        cls, classes: int | Sequence[int], tasks: int, scenario: Scenario = "class", seed: int | None = 0
    ) -> "Split":
        """Shuffles classes by ``seed`` and deals them out; task ``i`` gets those from ``floor(n i / tasks)`` on.

        Args:
            classes: Their number, or which ones (those that no base was trained on, say).
            tasks: Number of tasks; from 1 to the number of classes.
            scenario: As above.
            seed: Of the order; ``None`` keeps it.

        Raises:
            ValueError: If there are fewer classes than tasks, or ``tasks`` is less than 1.
        """
        if isinstance(classes, Iterable):
            order = checked_classes(classes)
        else:
            order = list(range(whole("classes", classes, 1, LISTED)))
        tasks, seed = whole("tasks", tasks), None if seed is None else checked_seed("seed", seed)
        if not 1 <= tasks <= len(order):
            raise ValueError(f"`tasks` must be in [1, {len(order)}], the number of classes, got {tasks}.")
        if seed is not None:
            shuffled = torch.randperm(len(order), generator=torch.Generator().manual_seed(seed)).tolist()
            order = [order[index] for index in shuffled]
        bounds = [len(order) * i // tasks for i in range(tasks + 1)]
        return cls(tuple(tuple(order[a:b]) for a, b in pairwise(bounds)), scenario, seed)

    def seen(self, after: int) -> tuple[int, ...]:
        """The classes of the tasks up to task ``after``.

        Args:
            after: Index of a task, from 0.
        """
        return tuple(each for classes in self.tasks[: after + 1] for each in classes)

    def choices(self, after: int, task: int) -> tuple[int, ...]:
        """What the model may choose among for a sample of ``task``, after training task ``after``.

        Args:
            after: Index of the last task that was trained, from 0.
            task: Index of the task that the sample belongs to, from 0.
        """
        return self.seen(max(after, task)) if self.scenario == "class" else self.tasks[task]

    def indices(self, labels: Any, task: int) -> list[int]:
        """Where samples of a task are, given the labels of a dataset.

        Args:
            labels: Class numbers, one per sample.
            task: Index of the task, from 0.
        """
        return indices_of(labels, self.tasks[task])


def indices_of(labels: Any, classes: Iterable[int]) -> list[int]:
    """Places of the labels that are among the classes.

    Args:
        labels: Class numbers, one per sample.
        classes: Class numbers that are looked for.

    Raises:
        ValueError: If there is none.

    Example:
        >>> indices_of([2, 0, 1, 2], classes=(2, 0))
        [0, 1, 3]
    """
    wanted = torch.tensor(sorted(checked_classes(classes)))
    try:
        known = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"`labels` must be class numbers, got {labels!r}.") from None
    if known.is_floating_point() or known.is_complex() or not known.dim():
        raise TypeError(f"`labels` must be several class numbers, got {labels!r}.")
    found: list[int] = torch.isin(known, wanted).nonzero().flatten().tolist()
    if not found:
        raise ValueError(
            f"`labels`: no sample is of the classes {wanted.tolist()}: the labels are of other data than the split."
        )
    return found


def labels_of(dataset: Any) -> Tensor:
    """The labels of a dataset of (input, label) pairs, without reading inputs where it keeps labels apart.

    Looks at ``targets`` (torchvision), ``labels`` and ``tensors[1]`` (``TensorDataset``), through ``Subset``; else it
    reads every sample.

    Args:
        dataset: A dataset with a length, whose samples are pairs of an input and a class number.

    Example:
        >>> from torch.utils.data import Subset, TensorDataset
        >>> data = TensorDataset(torch.zeros(3, 1), torch.tensor([4, 5, 6]))
        >>> labels_of(Subset(data, [2, 0]))
        tensor([6, 4])
    """
    if hasattr(dataset, "dataset") and hasattr(dataset, "indices"):
        return labels_of(dataset.dataset)[torch.as_tensor(dataset.indices)]
    for found in (getattr(dataset, "targets", None), getattr(dataset, "labels", None)):
        if found is not None:
            return torch.as_tensor(found)
    if hasattr(dataset, "tensors"):
        labels: Tensor = dataset.tensors[1]
        return labels
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__") or isinstance(dataset, (str, bytes)):
        raise TypeError(f"`dataset` must be a dataset of (input, label) pairs with a length, got {dataset!r}.")
    return torch.tensor([int(dataset[index][1]) for index in range(len(dataset))])
