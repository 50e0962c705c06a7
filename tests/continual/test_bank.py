"""A bank on disk: what it holds, what it refuses, and that a process may be killed at any moment."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lightning_merge.combiners import (
    DARE,
    EMR,
    OPCM,
    TIES,
    TSVM,
    Average,
    Combiner,
    Consensus,
    MagMax,
    MetaGPT,
    ModelStock,
    Sum,
)
from lightning_merge.continual import Bank
from lightning_merge.weights import Weights

pytest.importorskip("safetensors")

COMBINERS = [
    Sum("1/sqrt(t)"),
    MagMax(),
    TIES(0.5, weights={"task1": 2.0}),
    DARE(Average(), seed=3),
    OPCM(),
    TSVM(),
    MetaGPT(),
    Consensus(),
    EMR(),
    ModelStock(),
    ModelStock("mean_deg"),
]
every_combiner = pytest.mark.parametrize("combiner", COMBINERS, ids=repr)


def vector(task: int) -> Weights:
    generator = torch.Generator().manual_seed(task)
    shapes = {"net.weight": (4, 3), "scale": (), "a/b": (2,), "empty": (0, 3)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def filled(folder: Path, combiner: Combiner, tasks: int, keep_vectors: bool = True) -> Bank:
    bank = Bank(folder, combiner, keep_vectors=keep_vectors)
    for task in range(tasks):
        bank.add(vector(task), task=f"task{task}")
    return bank


def content(folder: Path) -> dict[str, bytes]:
    """Every file, without what a killed process left behind."""
    named = json.loads((folder / "bank.json").read_text())
    names = {"bank.json", named["state"]["file"], *(entry["file"] for entry in named["tasks"])} - {None}
    return {name: (folder / name).read_bytes() for name in sorted(names)}


def equal(a: Weights | None, b: Weights | None) -> bool:
    return a is not None and b is not None and list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


@every_combiner
def test_bank_opened_again_for_every_task_merges_what_the_combiner_does(tmp_path, combiner):
    for task in range(4):
        bank = Bank(tmp_path, combiner, keep_vectors=combiner.needs_every_vector)
        expected = bank.preview(vector(task), task=f"task{task}")
        bank.add(vector(task), task=f"task{task}")
        assert equal(bank.result(), expected)
    labels = [f"task{task}" for task in range(4)]
    assert equal(Bank(tmp_path).result(), combiner.combine([vector(task) for task in range(4)], labels))
    assert Bank(tmp_path).tasks == labels
    assert Bank(tmp_path).combiner == combiner
    assert Bank(tmp_path).verify() == []


def test_rules_of_constant_memory_keep_only_their_state(tmp_path):
    filled(tmp_path, MagMax(), 5, keep_vectors=False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_empty_bank_has_no_result_and_writes_nothing(tmp_path):
    bank = Bank(tmp_path / "new", Sum())
    assert (bank.result(), bank.tasks, bank.verify(), bank.added) == (None, [], [], 0)
    bank.preview(vector(0), task="cars")
    assert not (tmp_path / "new").exists()


def test_same_tasks_give_the_same_files_bit_for_bit(tmp_path):
    filled(tmp_path / "a", TIES(), 3)
    filled(tmp_path / "b", TIES(), 3)
    assert content(tmp_path / "a") == content(tmp_path / "b")


@every_combiner
def test_removed_task_leaves_what_the_others_merge_to_bit_for_bit(tmp_path, combiner):
    bank = filled(tmp_path, combiner, 4)
    bank.remove("task1")
    assert bank.tasks == ["task0", "task2", "task3"]
    assert bank.added == 4
    expected = combiner.combine([vector(task) for task in (0, 2, 3)], bank.tasks)
    assert equal(Bank(tmp_path).result(), expected)
    assert len(list(tmp_path.glob("vector-*"))) == 3
    for task in ("task0", "task2", "task3"):
        bank.remove(task)
    assert bank.result() is None
    bank.add(vector(1), task="task1")  # it may come back
    assert equal(bank.result(), combiner.combine([vector(1)], ["task1"]))


def test_linear_rule_removes_a_task_by_its_vector_alone(tmp_path):
    bank = filled(tmp_path, Sum(1.0), 3, keep_vectors=False)
    with pytest.raises(ValueError, match=r"has not kept the vector of task task1.*hand in its `vector`"):
        bank.remove("task1")
    with pytest.raises(ValueError, match="not the vector that was added as task task1"):
        bank.remove("task1", vector(2))
    bank.remove("task1", vector(1))
    expected = Sum(1.0).combine([vector(0), vector(2)])
    for name, tensor in Bank(tmp_path).result().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def test_rule_that_is_not_linear_removes_a_task_only_from_a_full_bank(tmp_path):
    bank = filled(tmp_path, MagMax(), 3, keep_vectors=False)
    with pytest.raises(ValueError, match="a bank made with `keep_vectors=True` can"):
        bank.remove("task1")
    with pytest.raises(TypeError, match="keep every vector"):
        bank.remove("task1", vector(1))
    assert Bank(tmp_path).tasks == ["task0", "task1", "task2"]


def test_damaged_state_is_named_and_rebuilt_from_the_vectors(tmp_path):
    bank = filled(tmp_path, TIES(), 3)
    before = content(tmp_path)
    (state,) = tmp_path.glob("state-*")
    damage(state)
    bank = Bank(tmp_path)
    assert bank.verify() == [f"{state} is damaged: it is not as it was written."]
    with pytest.raises(ValueError, match=f"{state.name} is damaged.*`rebuild\\(\\)` merges the kept vectors again"):
        bank.result()
    assert equal(bank.vector("task2"), vector(2))
    bank.rebuild()
    assert Bank(tmp_path).verify() == []
    assert content(tmp_path) == before


def test_damaged_vector_is_named_with_its_task_and_the_rest_goes_on(tmp_path):
    filled(tmp_path, Sum(), 3)
    path = tmp_path / json.loads((tmp_path / "bank.json").read_text())["tasks"][1]["file"]
    damage(path)
    bank = Bank(tmp_path)
    assert bank.verify() == [f"{path} is damaged: it is not as it was written. (task task1)"]
    with pytest.raises(ValueError, match=f"{path.name} is damaged.*other files of the bank are not affected"):
        bank.vector("task1")
    assert equal(bank.vector("task0"), vector(0))
    assert equal(bank.result(), Sum().combine([vector(task) for task in range(3)]))
    bank.add(vector(3), task="task3")
    bank.remove("task1")
    assert bank.verify() == []
    assert equal(bank.result(), Sum().combine([vector(task) for task in (0, 2, 3)]))


def test_missing_file_is_named(tmp_path):
    bank = filled(tmp_path, Sum(), 2)
    (state,) = tmp_path.glob("state-*")
    state.unlink()
    assert bank.verify() == [f"{state} is missing."]


@pytest.mark.parametrize("name", ["bank.json", "bank-copy.json"])
@pytest.mark.parametrize("how", [damage, Path.unlink, lambda path: path.write_text("{")])
def test_one_damaged_manifest_is_named_and_the_other_serves(tmp_path, name, how):
    expected = filled(tmp_path, Sum(), 2).result()
    text = (tmp_path / name).read_text().replace('"task0"', '"task9"')
    (tmp_path / name).write_text(text)
    how(tmp_path / name)
    if name == "bank.json":
        with pytest.warns(UserWarning, match=r"bank.json is (damaged|missing)"):
            bank = Bank(tmp_path)
    else:
        bank = Bank(tmp_path)
    assert len(bank.verify()) == 1
    assert name in bank.verify()[0]
    assert equal(bank.result(), expected)
    bank.add(vector(2), task="task2")
    assert bank.verify() == []


def test_manifest_edited_by_hand_is_damaged(tmp_path):
    filled(tmp_path, Sum(), 1)
    for name in ("bank.json", "bank-copy.json"):
        path = tmp_path / name
        path.write_text(path.read_text().replace("0.3", "0.4"))
    with pytest.warns(UserWarning, match="damaged"), pytest.raises(ValueError, match=r"So is its copy, bank-copy.json"):
        Bank(tmp_path)


@pytest.mark.parametrize(
    ("misuse", "message"),
    [
        (lambda bank: bank.add(vector(7), task="task0"), "task 'task0' is in the bank .* already.*'task0', 'task1'"),
        (lambda bank: bank.remove("pets"), "there is no task 'pets' in the bank"),
        (
            lambda bank: (bank.remove("task1"), bank.remove("task1")),
            "task 'task1' was removed from the bank .* already",
        ),
        (
            lambda bank: bank.add({**vector(2), "scale": torch.tensor(float("nan"))}, task="c"),
            "`scale` .* task c holds",
        ),
        (lambda bank: bank.add({**vector(2), "scale": torch.ones(2)}, task="c"), r"task c .*`scale` has shape \(2,\)"),
        (lambda bank: bank.preview({**vector(2), "head": torch.ones(2)}, task="c"), "`head` .* is not part of this"),
        (lambda bank: bank.vector("pets"), "there is no task 'pets'"),
        (lambda bank: Bank(bank.folder, MagMax()), r"was merged by Sum\(scale=0.3\), and `combiner` is MagMax"),
        (lambda bank: Bank(bank.folder.parent / "none"), "there is no bank in .*none: name the `combiner`"),
    ],
)
def test_misuse_is_an_error_that_changes_nothing_else(tmp_path, misuse, message):
    bank = filled(tmp_path / "bank", Sum(), 2)
    with pytest.raises(ValueError, match=message):
        misuse(bank)
    again = Bank(bank.folder)
    assert again.verify() == []
    assert again.tasks[:1] == ["task0"]
    assert not (tmp_path / "none").exists()


def test_vectors_cannot_be_kept_from_the_middle_of_a_stream_on(tmp_path):
    filled(tmp_path, Sum(), 1, keep_vectors=False)
    with pytest.raises(ValueError, match="`keep_vectors` must stay False"):
        Bank(tmp_path, keep_vectors=True)
    with pytest.raises(ValueError, match="needs every vector: make the bank with `keep_vectors=True`"):
        Bank(tmp_path / "new", ModelStock("mean_deg"))
    assert filled(tmp_path / "full", Sum(), 1).keeps_vectors
    assert Bank(tmp_path / "full", Sum()).keeps_vectors


def test_bank_of_another_base_is_refused_by_the_first_tensor_that_differs(tmp_path):
    base = {"first": torch.ones(3), "second": torch.ones(3, dtype=torch.bfloat16)}
    Bank(tmp_path, Sum(), base=base).add(vector(0), task="cars")
    Bank(tmp_path, base=base)
    with pytest.raises(ValueError, match=r"bank .* is of another base: `second` has hash"):
        Bank(tmp_path, base={**base, "second": base["second"] * 2})
    with pytest.raises(ValueError, match="`third` has hash of no tensor"):
        Bank(tmp_path, base={**base, "third": base["first"]})


def test_newer_format_is_refused(tmp_path):
    filled(tmp_path, Sum(), 1)
    manifest = json.loads((tmp_path / "bank.json").read_text())
    (tmp_path / "bank.json").write_text(json.dumps({**manifest, "format": 2}))
    with pytest.raises(ValueError, match="has format 2; this version of lightning-merge reads up to 1"):
        Bank(tmp_path)


class Killed(BaseException):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, moment: int) -> Callable[[], int]:
    """Makes the given call that touches the disk fail, as if the process were killed before it."""
    import safetensors.torch

    calls = 0

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **keywords: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == moment:
                raise Killed
            return function(*arguments, **keywords)

        return call

    monkeypatch.setattr(safetensors.torch, "save_file", dying(safetensors.torch.save_file))
    for name in ("replace", "write_text", "unlink", "mkdir"):
        monkeypatch.setattr(Path, name, dying(getattr(Path, name)))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    return lambda: calls


STEPS = [
    lambda bank: bank.add(vector(3), task="task3"),
    lambda bank: bank.remove("task1"),
    lambda bank: bank.rebuild(),
]


@pytest.mark.parametrize("step", STEPS, ids=["add", "remove", "rebuild"])
def test_process_killed_at_any_write_leaves_the_bank_before_or_after(tmp_path, step):
    before = content(filled(tmp_path / "before", TIES(0.5), 3).folder)
    shutil.copytree(tmp_path / "before", tmp_path / "after")
    step(Bank(tmp_path / "after"))
    after = content(tmp_path / "after")
    seen, moment = set(), 0
    while True:
        moment += 1
        folder = tmp_path / f"killed{moment}"
        shutil.copytree(tmp_path / "before", folder)
        bank = Bank(folder)
        with pytest.MonkeyPatch.context() as patch:
            calls = kill_at(patch, moment)
            try:
                step(bank)
            except Killed:
                pass
            else:
                assert calls() < moment
                break
        found = content(folder)
        assert found in (before, after)
        seen.add(found == after)
        opened = Bank(folder)
        assert opened.verify() == []
        if found == before:
            step(opened)
        opened.add(vector(9), task="next")
        again = Bank(folder)
        assert again.verify() == []
        files = {path.name for path in folder.iterdir()}
        assert files == {*content(folder), "bank-copy.json"}
    assert moment > 10
    assert before == after or seen == {False, True}


def test_process_killed_at_any_write_of_the_first_vector_leaves_a_whole_bank(tmp_path):
    for moment in range(1, 100):
        folder = tmp_path / str(moment)
        with pytest.MonkeyPatch.context() as patch:
            calls = kill_at(patch, moment)
            with contextlib.suppress(Killed):
                filled(folder, MagMax(), 1)
        opened = Bank(folder, MagMax())
        assert opened.verify() == []
        if calls() < moment:
            break
        if not opened.added:
            filled(folder, MagMax(), 1)
        opened = Bank(folder, MagMax())
        opened.add(vector(1), task="task1")
        assert (folder / "bank-copy.json").exists()
        assert Bank(folder, MagMax()).verify() == []
    assert moment > 5


def test_process_killed_at_random_goes_on_to_the_same_bank(tmp_path):
    generator = torch.Generator().manual_seed(0)
    kills = 0
    filled(tmp_path / "a", MagMax(), 1)  # a kill between the first manifest and its copy leaves one of the two
    while Bank(tmp_path / "a", MagMax()).added < 30:
        process = os.fork()
        if not process:
            try:
                bank = Bank(tmp_path / "a", MagMax(), keep_vectors=True)
                for task in range(bank.added, min(bank.added + 8, 30)):
                    bank.add(vector(task), task=f"task{task}")
                time.sleep(60)  # a fast machine too needs several processes
            finally:
                os._exit(1)
        time.sleep(float(torch.rand((), generator=generator)) * 0.1)
        os.kill(process, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
        assert Bank(tmp_path / "a", MagMax()).verify() == []
        kills += 1
    assert kills > 3
    filled(tmp_path / "b", MagMax(), 30)
    assert content(tmp_path / "a") == content(tmp_path / "b")


def weights(number: float) -> Weights:
    return {"w": torch.full((2,), number)}


STEPS = {
    "add": lambda bank: bank.add(weights(7.0), task="own"),
    "remove": lambda bank: bank.remove("first"),
    "rebuild": lambda bank: bank.rebuild(),
}


@pytest.mark.parametrize("step", STEPS)
def test_a_writer_that_knows_an_older_state_is_told_and_loses_nothing(step, tmp_path):
    Bank(tmp_path, Sum(1.0), keep_vectors=True).add(weights(1.0), task="first")
    one, other = Bank(tmp_path), Bank(tmp_path)
    one.add(weights(2.0), task="second")
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"another process .* were \['first'\] and are \['first', 'second'\]"):
        STEPS[step](other)
    assert content(tmp_path) == before
    STEPS[step](other)  # it knows now
    assert "second" in Bank(tmp_path).tasks
    assert Bank(tmp_path).verify() == []


def test_a_bank_that_two_begin_holds_what_the_first_has_written(tmp_path):
    one, other = (Bank(tmp_path, Sum(1.0)) for _ in range(2))
    one.add(weights(1.0), task="first")
    with pytest.raises(ValueError, match="another process has changed"):
        other.add(weights(2.0), task="second")
    assert Bank(tmp_path).tasks == ["first"]


def test_a_reader_beside_a_writer_reads_what_is_there_now(tmp_path):
    writer = Bank(tmp_path, Sum(1.0), keep_vectors=True)
    writer.add(weights(1.0), task="first")
    readers = [Bank(tmp_path) for _ in range(4)]
    writer.add(weights(2.0), task="second")
    expected = writer.result()
    assert torch.equal(readers[0].result()["w"], expected["w"])
    assert readers[1].verify() == []
    assert torch.equal(readers[2].preview(weights(0.0), task="third")["w"], expected["w"])
    writer.remove("first")
    with pytest.raises(ValueError, match="'first' was removed"):
        readers[3].vector("first")
    next(tmp_path.glob("state-*")).unlink()
    with pytest.raises(ValueError, match="missing"):  # nothing that a writer did
        readers[0].result()


def add_five(folder: Path, name: str) -> None:
    for task in range(5):
        while True:
            try:
                Bank(folder).add({"w": torch.ones(2)}, task=f"{name}-{task}")
                break
            except ValueError as error:
                if "another process has changed" not in str(error):
                    raise


def test_processes_that_add_at_once_lose_nothing(tmp_path):
    Bank(tmp_path, Sum(1.0)).add(weights(0.0), task="first")
    fork = multiprocessing.get_context("fork")
    writers = [fork.Process(target=add_five, args=(tmp_path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    bank = Bank(tmp_path)
    assert len(bank.tasks) == 11
    assert float(bank.result()["w"][0]) == 10.0
    assert bank.verify() == []


def test_what_killed_writers_left_goes_with_the_next_step(tmp_path):
    bank = Bank(tmp_path, Sum(1.0), keep_vectors=True)
    for name in ("state.part", "bank.json.part", "vector-0009-0123456789abcdef.safetensors"):
        (tmp_path / name).write_text("cut")
    bank.add(weights(1.0), task=np.str_("first"))
    assert sorted(path.name.partition("-")[0] for path in tmp_path.iterdir()) == [
        "bank",
        "bank.json",
        "state",
        "vector",
    ]
    assert torch.equal(bank.vector(np.str_("first"))["w"], weights(1.0)["w"])
