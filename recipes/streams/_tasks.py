"""Streams of tasks from any classification data module."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler, Sampler, Subset

from lightning_merge.continual import Split, indices_of, labels_of


class TaskData(LightningDataModule):
    """One task: the samples of some classes of another data module, or all of them with their inputs changed.

    Loaders are those of the other module, with the same batch size, workers and collation. What is shuffled is shuffled
    by torch's seed and the number of the epoch.

    Args:
        data: Gives loaders over datasets of (input, label) pairs.
        task: What the task is called.
        classes: Whose samples it holds; ``None`` for all. A ``Classifier`` is trained on these logits alone, and
            ``ContinualMerging`` keeps these rows of the head.
        choices: What a ``Classifier`` may choose among when it is measured; ``None`` for all.
        change: Applied to a batch of inputs.

    Attributes:
        choices: As above; a stream that is run sets it for each evaluation.
    """

    def __init__(
        self,
        data: LightningDataModule,
        task: str,
        classes: Sequence[int] | None = None,
        choices: Sequence[int] | None = None,
        change: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.data = data
        self.task = task
        self.classes = None if classes is None else tuple(classes)
        self.choices = None if choices is None else tuple(choices)
        self.change = change

    def prepare_data(self) -> None:
        """Prepares the other module."""
        self.data.prepare_data()

    def setup(self, stage: str) -> None:
        """Sets the other module up, once for all the tasks made from it."""
        ready = self.data.__dict__.setdefault("_stages_of_stream", set())
        if stage not in ready:
            self.data.trainer = self.trainer  # it may look at the model
            self.data.setup(stage)
            ready.add(stage)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._of_task(self.data.train_dataloader())

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if not is_overridden("val_dataloader", self.data):
            return []  # no validation
        return self._of_task(self.data.val_dataloader())

    def test_dataloader(self) -> DataLoader[Any]:
        return self._of_task(self.data.test_dataloader())

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._of_task(self.data.predict_dataloader())

    def _of_task(self, loader: Any) -> DataLoader[Any]:
        if not isinstance(loader, DataLoader) or loader.batch_size is None:
            raise TypeError(
                "a stream needs a DataLoader that makes batches of a dataset with a length, got"
                f" {type(loader).__name__} of {type(self.data).__name__}."
            )
        dataset: Any = loader.dataset
        if self.classes is not None:
            dataset = Subset(dataset, indices_of(labels_of(dataset), self.classes))
        collate = loader.collate_fn
        return DataLoader(
            dataset,
            min(loader.batch_size, len(dataset)) if loader.drop_last else loader.batch_size,
            sampler=_Shuffled(len(dataset)) if isinstance(loader.sampler, RandomSampler) else None,
            generator=torch.Generator(),  # starting an epoch draws a number, which a resumed epoch would not draw again
            drop_last=loader.drop_last,
            num_workers=loader.num_workers,
            collate_fn=collate if self.change is None else _Changed(collate, self.change),
            pin_memory=loader.pin_memory,
            persistent_workers=loader.persistent_workers,
            worker_init_fn=loader.worker_init_fn,
        )


def split_by_class(data: LightningDataModule, split: Split) -> list[TaskData]:
    """A task per group of classes, in the order of the split.

    Args:
        data: Labels are numbers from 0.
        split: Which classes are in which task; ``Split.of(10, tasks=5, seed=0)`` deals them out.

    Example:
        >>> from lightning_merge.recipes import Digits
        >>> tasks = split_by_class(Digits(), Split.of(10, tasks=5, seed=None))
        >>> tasks[1].task, tasks[1].classes, tasks[1].choices
        ('task1', (2, 3), (0, 1, 2, 3))
    """
    return [
        TaskData(data, f"task{index}", classes, split.choices(index, index))
        for index, classes in enumerate(split.tasks)
    ]


def split_by_domain(
    data: LightningDataModule, domains: Mapping[str, Callable[[Tensor], Tensor]], seed: int | None = 0
) -> list[TaskData]:
    """A task per domain (domain-incremental): the same classes with differently transformed inputs.

    Args:
        data: Where the samples are from.
        domains: By name, what becomes of a batch of inputs.
        seed: Shuffles the order of the tasks; ``None`` keeps it. The names of the tasks record it.

    Raises:
        ValueError: If there is no domain.

    Example:
        >>> from lightning_merge.recipes import Digits
        >>> [task.task for task in split_by_domain(Digits(), {"upright": torch.clone, "black": torch.zeros_like}, None)]
        ['upright', 'black']
    """
    if not domains:
        raise ValueError("`domains` must hold at least one domain, got none.")
    names = list(domains)
    if seed is not None:
        names = [names[i] for i in torch.randperm(len(names), generator=torch.Generator().manual_seed(seed)).tolist()]
    return [TaskData(data, name, change=domains[name]) for name in names]


def jointly(tasks: Sequence[TaskData]) -> TaskData:
    """All tasks of a split by class as one: for the upper bound that trains on everything, and to test on everything.

    Args:
        tasks: What ``split_by_class`` gave, all of it.

    Raises:
        ValueError: If the tasks have no classes of their own, as those of a split by domain.
    """
    classes = [each for task in tasks for each in task.classes or ()]
    if not classes:
        raise ValueError("`tasks` must each have `classes`; tasks that differ in their domain have all of them.")
    return TaskData(tasks[0].data, "all tasks", classes, classes)


@final
class _Shuffled(Sampler[int]):
    """A random order per epoch that depends on torch's seed alone, so that a resumed run repeats it."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epoch = 0

    def __len__(self) -> int:
        return self.size

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch; Lightning calls it before each."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((torch.initial_seed() + self.epoch) % 2**63)
        yield from torch.randperm(self.size, generator=generator).tolist()


@final
@dataclass(frozen=True)
class _Changed:
    """Collates, then transforms the inputs; a class, since worker processes unpickle it."""

    collate: Callable[[Any], Any]
    change: Callable[[Tensor], Tensor]

    def __call__(self, samples: Any) -> Any:
        inputs, *rest = self.collate(samples)
        return [self.change(inputs), *rest]
