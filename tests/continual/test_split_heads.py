"""How classes are dealt to tasks, and what heads and losses do with the classes of a task."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from lightning_merge.continual import Split, grow_head, indices_of, labels_of, masked_cross_entropy, only, remapped


def test_every_class_is_in_one_task_and_the_order_is_the_seeds() -> None:
    split = Split.of(10, tasks=3, seed=1993)
    assert sorted(split.seen(2)) == list(range(10))
    assert [len(classes) for classes in split.tasks] == [3, 3, 4]
    assert split == Split.of(10, tasks=3, seed=1993) != Split.of(10, tasks=3, seed=5)
    assert split.seed == 1993


def test_only_the_named_classes_are_dealt() -> None:
    assert sorted(Split.of([9, 4, 7, 2], tasks=2).seen(1)) == [2, 4, 7, 9]


def test_class_incremental_chooses_among_what_was_seen_and_task_incremental_within_the_task() -> None:
    by_class, by_task = (Split.of(6, tasks=3, seed=None, scenario=scenario) for scenario in ("class", "task"))  # type: ignore[arg-type]
    assert by_class.choices(after=1, task=0) == (0, 1, 2, 3)
    assert by_class.choices(after=0, task=2) == (0, 1, 2, 3, 4, 5)  # a task to come: its classes must be among them
    assert by_task.choices(after=2, task=1) == (2, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Split(((0, 1), (1, 2))), r"must not overlap .* class 1 is in task 0 and task 1.*domain-incremental"),
        (lambda: Split(((0,), ())), r"at least one class, got none in task 1"),
        (lambda: Split(()), r"at least one task"),
        (lambda: Split(((0,),), scenario="domain"), r"`scenario` must be 'class' or 'task', got 'domain'"),
        (lambda: Split.of(3, tasks=4), r"`tasks` must be in \[1, 3\], the number of classes, got 4"),
        (lambda: indices_of([0, 1], classes=(5,)), r"no sample is of the classes \[5\]"),
        (lambda: remapped(torch.tensor([3, 4]), classes=(3, 7)), r"among the classes of the task, \[3, 7\], got 4"),
        (lambda: only(torch.zeros(1, 3), classes=(1, 3)), r"`classes` must be in \[0, 3\).*Grow the head"),
        (lambda: grow_head(nn.Linear(2, 3), 2), r"`num_classes` must be at least 3.*got 2"),
    ],
)
def test_bad_input_is_refused(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


class Plain(Dataset[tuple[float, int]]):
    """Keeps no labels apart."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> tuple[float, int]:
        return 0.0, 10 * index


def test_labels_are_found_wherever_a_dataset_keeps_them() -> None:
    data = TensorDataset(torch.zeros(4, 1), torch.tensor([5, 6, 7, 8]))
    assert labels_of(data).tolist() == [5, 6, 7, 8]
    assert labels_of(Subset(Subset(data, [3, 2, 1]), [0, 2])).tolist() == [8, 6]
    assert labels_of(Plain()).tolist() == [0, 10, 20]


def test_masked_loss_moves_no_logit_of_another_task() -> None:
    logits = torch.randn(4, 5, requires_grad=True)
    masked_cross_entropy(logits, torch.tensor([1, 3, 3, 1]), classes=(3, 1), label_smoothing=0.1).backward()
    assert logits.grad is not None
    moved = logits.grad.abs().sum(0) > 0
    assert moved.tolist() == [False, True, False, True, False]


def test_masked_loss_is_that_of_a_head_of_the_tasks_own() -> None:
    logits, labels = torch.randn(6, 5), torch.tensor([1, 3, 3, 1, 1, 3])
    own = nn.functional.cross_entropy(logits[:, [3, 1]], (labels == 1).long())
    torch.testing.assert_close(masked_cross_entropy(logits, labels, (3, 1)), own)
    everything = nn.functional.cross_entropy(logits, labels)
    assert masked_cross_entropy(logits, labels, None) == everything
    assert only(logits, None) is logits


def test_a_grown_head_gives_the_same_logits_for_the_old_classes() -> None:
    head = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    torch.testing.assert_close(grow_head(head, 6)(x)[:, :2], head(x))
    assert grow_head(nn.Linear(4, 2, bias=False), 3).bias is None
