"""Whatever fails once a task is trained: raw weights are in the module, and the task is in the bank or in a file."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from tiny import Net, batches, differing, read, trainer, values
from torch import nn

from lightning_merge.callbacks import ContinualMerging
from lightning_merge.callbacks import _continual_merging as merging_of_tasks
from lightning_merge.callbacks._task_run._heads import Head
from lightning_merge.combiners import Average
from lightning_merge.continual import Bank, StreamState


def full(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def stopped(*args: Any, **kwargs: Any) -> Any:
    raise KeyboardInterrupt


def fails(owner: Any, name: str, how: Callable[..., Any] = full) -> Callable[[Path, pytest.MonkeyPatch], None]:
    return lambda folder, patch: patch.setattr(owner, name, how)


def damages(pattern: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def damage(folder: Path, patch: pytest.MonkeyPatch) -> None:
        (path,) = folder.glob(pattern)
        path.write_bytes(path.read_bytes()[:-1] + b"x")

    return damage


@dataclass
class Fault:
    """What goes wrong at the end of the second task, and what the error is."""

    cause: Callable[[Path, pytest.MonkeyPatch], None]
    error: type[BaseException] = OSError


FAULTS = {
    "the merge": Fault(fails(Bank, "preview")),
    "what earlier tasks left": Fault(fails(StreamState, "load")),
    "statistics of BatchNorm": Fault(fails(merging_of_tasks, "recalibrate")),
    "the head": Fault(fails(Head, "joined")),
    "a second Ctrl-C": Fault(fails(merging_of_tasks, "recalibrate", stopped), SystemExit),
    "the state of the stream": Fault(fails(StreamState, "save")),
    "the bank": Fault(fails(Bank, "add")),
    "a damaged bank": Fault(damages("state-*"), ValueError),
}


class AtTheEnd(Callback):
    """Comes before the callback that takes tasks in: notes the raw weights, then has something go wrong."""

    def __init__(self, act: Callable[[], None] = lambda: None) -> None:
        self.act = act
        self.raw: dict[str, Any] = {}
        self.notes: list[str] = []

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.raw = values(pl_module)
        self.act()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.notes = list(getattr(exception, "__notes__", []))


def stream(folder: Path) -> ContinualMerging:
    return ContinualMerging("average", folder / "bank", keep_vectors=True)


def train(root: Path, module: Any, cl: ContinualMerging, seed: int, *callbacks: Any) -> None:
    trainer(root, [*callbacks, cl], max_epochs=1).fit(module, batches(seed=seed))


def rescued(end: AtTheEnd) -> Path:
    """The file that the error names."""
    (note,) = [note for note in end.notes if "is trained" in note]
    found = re.search(r"the task is in (\S+)\. Once", note)
    assert found is not None, note
    assert f".rebuild({found[1]!r})" in note
    return Path(found[1])


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_task_that_cannot_be_taken_in_is_in_a_file_that_rebuild_takes(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, module = Net(norm=True), Net(norm=True)
    expected, cl = stream(tmp_path / "whole"), stream(tmp_path)
    for seed in (1, 2):
        train(tmp_path, whole, expected, seed)
    train(tmp_path, module, cl, 1)
    with monkeypatch.context() as patch:
        end = AtTheEnd(lambda: fault.cause(cl.folder, patch))
        with pytest.raises(fault.error):
            train(tmp_path, module, cl, 2, end)
    assert not differing(end.raw, module)  # adapters and statistics too
    path = rescued(end)
    bank = Bank(cl.folder, Average(), keep_vectors=True)
    if bank.verify():
        bank.rebuild()
    bank.rebuild(path)
    assert bank.tasks == ["task0", "task1"]
    assert not differing(bank.result() or {}, expected.merged_vector() or {})
    for net, callback in ((module, cl), (whole, expected)):
        train(tmp_path, net, callback, 3)  # and on the stream goes
    parameters = [values(dict(net.named_parameters())) for net in (module, whole)]
    assert not differing(*parameters)
    with pytest.raises(ValueError, match=r"is in the bank .* already|must be of task 3"):
        Bank(cl.folder).rebuild(path)


def test_a_first_task_is_rescued_into_a_bank_that_is_not_there_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, cl, end = Net(), ContinualMerging("lora-arithmetic", tmp_path / "bank", lora_rank=2), AtTheEnd()
    names = set(module.state_dict())
    with monkeypatch.context() as patch:
        patch.setattr(Bank, "add", full)
        with pytest.raises(OSError, match="No space"):
            train(tmp_path, module, cl, 1, end)
    assert set(module.state_dict()) == names
    bank = Bank(cl.folder, cl.combiner)
    bank.rebuild(rescued(end))
    other = Net()
    cl.load_merged(other)
    assert not torch.equal(other.net[0].weight, Net().net[0].weight)


def test_where_the_banks_folder_takes_no_file_it_is_elsewhere(tmp_path: Path) -> None:
    module, cl = Net(), stream(tmp_path)
    train(tmp_path, module, cl, 1)

    def lose_the_folder() -> None:
        cl.folder.rename(tmp_path / "away")
        cl.folder.write_text("no folder")

    end = AtTheEnd(lose_the_folder)
    with pytest.raises((OSError, ValueError)):
        train(tmp_path / "root", module, cl, 2, end)
    assert rescued(end).parent == tmp_path / "root"
    assert not differing(end.raw, module)


def test_files_that_cannot_be_written_after_the_task_leave_it_in_the_bank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, cl = Net(), stream(tmp_path)
    monkeypatch.setattr(merging_of_tasks, "write_merged", full)
    with pytest.raises(OSError, match="No space"):
        train(tmp_path, module, cl, 1)
    assert cl.tasks == ["task0"]
    train_on = stream(tmp_path)
    monkeypatch.undo()
    train(tmp_path, module, train_on, 2)
    assert train_on.completed == 2


def test_what_was_unfrozen_in_a_later_task_is_named_before_it_is_trained(tmp_path: Path) -> None:
    class Unfreezes(Callback):
        def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
            pl_module.net[0].requires_grad_(trainer.current_epoch > 0)

    module, cl = Net(), stream(tmp_path)
    module.net[0].requires_grad_(False)
    module.net.insert(1, nn.Linear(8, 8))
    train(tmp_path, module, cl, 1)
    module.net[0].requires_grad_(False)
    before = values({"w": module.net[0].weight})
    with pytest.raises(ValueError, match=r"other parameters are trained than in the first task.*`net\.0\.weight`"):
        trainer(tmp_path, [cl, Unfreezes()], max_epochs=2).fit(module, batches(seed=2))
    assert torch.equal(before["w"], module.net[0].weight)
    assert cl.completed == 1


def test_what_moves_while_it_is_frozen_is_merged_from_the_first_task_on_or_named(tmp_path: Path) -> None:
    """As the target of a student, which follows it without gradients."""

    def follow(module: Any, value: float) -> AtTheEnd:
        def act() -> None:
            module.net[0].weight.data.fill_(value)

        return AtTheEnd(act)

    for first in (True, False):
        module, cl = Net(), stream(tmp_path / str(first))
        module.net.insert(1, nn.Linear(8, 8))
        module.net[0].requires_grad_(False)
        train(tmp_path, module, cl, 1, *([follow(module, 1.0)] if first else []))
        assert ("net.0.weight" in (cl.merged_vector() or {})) is first
        end = follow(module, 3.0)
        if first:
            train(tmp_path, module, cl, 2, end)
            torch.testing.assert_close(module.net[0].weight.detach(), torch.full((8, 4), 2.0))
        else:
            with pytest.raises(ValueError, match=r"other parameters are trained.*`net\.0\.weight` was frozen then"):
                train(tmp_path, module, cl, 2, end)
            assert module.net[0].weight.detach().unique().tolist() == [3.0]
            Bank(cl.folder).rebuild(rescued(end))
            assert cl.tasks == ["task0", "task1"]


def test_a_task_that_trained_nothing_leaves_no_file(tmp_path: Path) -> None:
    module, cl = Net(lr=0.0), stream(tmp_path)
    with pytest.raises(ValueError, match="empty task vector"):
        train(tmp_path, module, cl, 1)
    assert not list(tmp_path.rglob("rescue-*"))


def test_a_file_of_another_stream_is_not_written_over(tmp_path: Path) -> None:
    for name in ("one", "two"):
        module = Net()
        cl = ContinualMerging("average", tmp_path / name)
        train(tmp_path, module, cl, 1 if name == "one" else 2, ModelCheckpoint(tmp_path / "files", name))
    first, second = (tmp_path / "files" / f"task0-merged{end}.ckpt" for end in ("", "-v1"))
    assert differing(read(first)["state_dict"], read(second)["state_dict"])
