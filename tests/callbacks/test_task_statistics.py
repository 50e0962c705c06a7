"""Streams whose tasks are weighed by statistics, or served by signs: what the bank keeps of them, and for how long."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from tiny import Net, batches, differing, trainer, values

from lightning_merge.callbacks import ContinualMerging, ImportanceStatistics
from lightning_merge.combiners import EMR, Combiner, Fisher, MaTS, RegMean, task_vector
from lightning_merge.continual import Bank
from lightning_merge.weights import Weights

PRESETS: dict[str, Callable[[Any], Combiner]] = {"fisher": Fisher, "regmean": RegMean}
KINDS = {"fisher": "fisher", "regmean": "gram"}
NEW = ["fisher", "regmean", "emr", "iso-c"]


def stream(preset: Any, folder: Path, **settings: Any) -> ContinualMerging:
    return ContinualMerging(preset, folder / "bank", head=[], **settings)


def run(merging: ContinualMerging, module: Any, folder: Path, task: int, *callbacks: Any, **settings: Any) -> None:
    seeded = batches(4, seed=task + 1)
    trainer(folder, [*callbacks, merging], max_epochs=2).fit(module, seeded, **settings)


def finished(preset: Any, folder: Path, tasks: int = 3, **settings: Any) -> ContinualMerging:
    """A stream, each of whose tasks is trained by a callback and a module of its own, as in further processes."""
    for task in range(tasks):
        run(stream(preset, folder, **settings), Net(norm=True), folder, task)
    return stream(preset, folder, **settings)


def alone(folder: Path, kind: str, task: int) -> tuple[Weights, Any]:
    """The vector and the statistics of a task that is trained from the base without a stream."""
    module, measuring = Net(norm=True), ImportanceStatistics(kind)  # type: ignore[arg-type]
    base = {name: p.detach().clone() for name, p in module.named_parameters()}
    trainer(folder, [measuring], max_epochs=2).fit(module, batches(4, seed=task + 1))
    return task_vector({name: p.detach() for name, p in module.named_parameters()}, base), measuring.statistics


@pytest.mark.parametrize("preset", list(PRESETS))
def test_a_stream_merges_by_the_statistics_of_each_tasks_own_end(preset: str, tmp_path: Path) -> None:
    found = finished(preset, tmp_path).merged_vector()
    tasks = [alone(tmp_path, KINDS[preset], task) for task in range(3)]
    known = {task: statistics for task, (_, statistics) in enumerate(tasks)}
    expected = PRESETS[preset](known).combine([vector for vector, _ in tasks])
    assert found is not None
    assert not differing(found, expected)
    assert differing(found, PRESETS[preset]({**known, 0: known[1]}).combine([vector for vector, _ in tasks]))


class Killed(Exception):
    pass


class KillAt(Callback):
    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        trainer.save_checkpoint(self.file)
        raise Killed


@pytest.mark.parametrize("preset", NEW)
def test_a_stream_that_was_killed_inside_a_task_ends_as_if_it_had_not_been(preset: str, tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    expected = finished(preset, whole, tasks=2)
    run(stream(preset, killed), Net(norm=True), killed, 0)
    with pytest.raises(Killed):
        run(stream(preset, killed), Net(norm=True), killed, 1, KillAt(tmp_path / "at.ckpt"))
    run(stream(preset, killed), Net(norm=True), killed, 1, ckpt_path=tmp_path / "at.ckpt")
    assert not differing(stream(preset, killed).merged_vector(), expected.merged_vector())
    kept = [sorted(path.name for path in (folder / "bank").glob("beside-*")) for folder in (whole, killed)]
    assert kept[0] == kept[1]
    assert len(kept[0]) == (0 if preset == "iso-c" else 2)


@pytest.mark.parametrize("preset", NEW)
def test_a_task_is_unlearned_with_what_was_kept_of_it(preset: str, tmp_path: Path) -> None:
    folder = tmp_path / "bank"
    finished(preset, tmp_path, keep_vectors=True)
    bank = Bank(folder)
    others = [(task, bank.vector(task)) for task in ("task0", "task2")]
    without = Net(norm=True)
    stream(preset, tmp_path, keep_vectors=True).load_merged(without, without="task1")
    expected = bank.rule.combine([vector for _, vector in others], [task for task, _ in others])
    files = len(list(folder.glob("beside-*")))
    bank.remove("task1")
    assert not differing(Bank(folder).result(), expected)
    assert len(list(folder.glob("beside-*"))) == files - (files > 0)
    again = Net(norm=True)
    stream(preset, tmp_path, keep_vectors=True).load_merged(again)
    assert not differing(again, without)


@pytest.mark.parametrize("combiner", [RegMean({}), MaTS({}), MaTS({}, start="base")], ids=repr)
def test_sums_of_gram_matrices_give_a_task_up_again(combiner: Combiner, tmp_path: Path) -> None:
    for task in range(2):
        run(stream(combiner, tmp_path), Net(norm=True), tmp_path, task)
    bank, before = Bank(tmp_path / "bank", combiner), stream(combiner, tmp_path).merged_vector()
    vector, statistics = alone(tmp_path, "gram", 7)
    bank.add(vector, task="other", statistics=statistics)
    assert differing(bank.result(), before)
    bank.remove("other", vector)
    torch.testing.assert_close(bank.result(), before, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("rescaler", ["vector", "tensor"])
def test_a_bit_per_weight_serves_every_task_with_weights_of_its_own(rescaler: Any, tmp_path: Path) -> None:
    emr = EMR(rescaler)
    merging = finished(emr, tmp_path, keep_vectors=True)
    bank, base = Bank(tmp_path / "bank"), values(Net(norm=True))
    for task in range(3):
        own = emr.for_task(bank.vector(f"task{task}"), bank.result() or {})
        found = merging.weights_of(task)
        assert list(found) == list(own)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, base[name] + own[name])
    with pytest.raises(ValueError, match=r"`task` must be in \[0, 3\), got 3"):
        merging.weights_of(3)
    bank.remove("task0")
    with pytest.raises(ValueError, match="task 'task0' was removed"):
        merging.weights_of(0)
    with pytest.raises(ValueError, match="`combiner` must be EMR"):
        finished("iso-c", tmp_path / "other", tasks=1).weights_of(0)


def test_zeros_of_a_vector_are_in_no_mask_and_bits_are_packed(tmp_path: Path) -> None:
    vectors = [
        {"w": torch.tensor([0.0, -1.0, 2.0] * 1000), "e": torch.zeros(0, 2)},
        {"w": -torch.ones(3000), "e": torch.zeros(0, 2)},
    ]
    bank = Bank(tmp_path, EMR())
    for task, vector in enumerate(vectors):
        bank.add(vector, task=task)
    for task, vector in enumerate(vectors):
        assert not differing(bank.vector_for(task), EMR().for_task(vector, bank.result() or {}))
    sizes = sorted(path.stat().st_size for path in tmp_path.glob("beside-*"))
    assert sizes[0] < 3000 / 8 + 300
    assert sizes[1] < 3000 / 4 + 400  # one more bit, for the zeros


def test_what_is_frozen_in_a_later_task_has_statistics_too(tmp_path: Path) -> None:
    run(stream("fisher", tmp_path), Net(norm=True), tmp_path, 0)
    module = Net(norm=True)
    module.net[0].weight.requires_grad = False
    run(stream("fisher", tmp_path), module, tmp_path, 1)
    assert not module.net[0].weight.requires_grad
    assert stream("fisher", tmp_path).completed == 2


def test_a_bank_refuses_statistics_that_are_missing_or_of_another_model(tmp_path: Path) -> None:
    vector, statistics = alone(tmp_path, "fisher", 0)
    bank = Bank(tmp_path / "bank", Fisher({}))
    with pytest.raises(ValueError, match="`statistics` must hold those of every task, got none of task 'a'"):
        bank.add(vector, task="a")
    other = {**vector, "more": torch.ones(2)}
    with pytest.raises(ValueError, match="are of another model: it has no `more`"):
        bank.add(other, task="a", statistics=statistics)
    with pytest.raises(ValueError, match="RegMean takes statistics of kind 'gram'"):
        Bank(tmp_path / "two", RegMean({})).add(vector, task="a", statistics=statistics)
    with pytest.raises(ValueError, match="`statistics` must be left out for EMR"):
        Bank(tmp_path / "three", EMR()).add(vector, task="a", statistics=statistics)
    assert not [path for name in ("bank", "two", "three") for path in (tmp_path / name).glob("*.json")]


@pytest.mark.parametrize("preset", ["fisher", "emr"])
def test_damage_of_what_is_kept_beside_is_named(preset: str, tmp_path: Path) -> None:
    finished(preset, tmp_path, tasks=2)
    (path,) = (tmp_path / "bank").glob("beside-0001*")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert [f"{path.name} is damaged" in each and "(task task1)" in each for each in Bank(path.parent).verify()] == [
        True
    ]


def test_a_task_that_could_not_be_taken_in_keeps_its_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = finished("regmean", tmp_path / "whole", tasks=2).merged_vector()
    run(stream("regmean", tmp_path), Net(norm=True), tmp_path, 0)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Bank, "add", full)
    with pytest.raises(OSError, match="No space") as failed:
        run(stream("regmean", tmp_path), Net(norm=True), tmp_path, 1)
    monkeypatch.undo()
    path = re.search(r"rebuild\('(.*)'\)", failed.value.__notes__[-1])
    assert path is not None
    Bank(tmp_path / "bank", RegMean({})).rebuild(path[1])
    assert not differing(stream("regmean", tmp_path).merged_vector(), expected)


def test_a_step_that_gives_no_loss_of_a_sample_is_refused_with_the_first_batch(tmp_path: Path) -> None:
    class Pairs(Net):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if len(batch[0]) < 2:
                raise RuntimeError("a pair takes two")
            return super().training_step(batch, batch_idx)

    with pytest.raises(ValueError, match="`Fisher` takes the loss of single samples from `training_step`"):
        run(stream("fisher", tmp_path), Pairs(), tmp_path, 0)
    assert not (tmp_path / "bank" / "bank.json").exists()
