"""Every way in which a file is written: all of it, or nothing changes."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from readers import combined
from torch import nn
from torch.utils.data import DataLoader

from lightning_merge._commands._export import export
from lightning_merge.callbacks import EMA, LAWA
from lightning_merge.compat import read_weights
from lightning_merge.files import atomic, join, replacing
from lightning_merge.files._label import FORMAT, KEY, Label

STATE = {"w": torch.arange(4.0)}


def _by_atomic(source: Path, target: Path) -> None:
    with atomic(target) as file:
        torch.save(STATE, file)


def _export(source: Path, target: Path) -> None:
    export(str(source), target, None, "", None, force=True)


WRITERS: dict[str, Callable[[Path, Path], Any]] = {
    "atomic": _by_atomic,
    "export": _export,
    "export as safetensors": lambda source, target: _export(source, target.with_suffix(".safetensors")),
    "soup": lambda source, target: combined("soup", [source, source], target),
    "average": lambda source, target: combined("average", [source.parent], target, "--pattern", source.name),
}
every_writer = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS.keys())


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    torch.save({"state_dict": STATE, "global_step": 1, "epoch": 0}, tmp_path / "in" / "a.ckpt")
    return tmp_path / "in" / "a.ckpt"


def _half_of_it(*arguments: Any) -> None:
    target = arguments[1]
    if isinstance(target, Path):
        target.write_bytes(b"half")
    else:
        target.write(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


@every_writer
def test_a_full_disk_is_named_and_leaves_the_old_file(write: Any, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    for suffix in (".pt", ".safetensors"):
        (tmp_path / "out" / f"x{suffix}").write_bytes(b"old")
    before = sorted((tmp_path / "out").iterdir())
    with (
        mock.patch.object(torch, "save", _half_of_it),
        mock.patch.object(safetensors.torch, "save_file", _half_of_it),
        pytest.raises(OSError, match=r"out/x\.\w+ was not written: No space left on device"),
    ):
        write(source, tmp_path / "out" / "x.pt")
    assert sorted((tmp_path / "out").iterdir()) == before
    assert all(path.read_bytes() == b"old" for path in before)


@every_writer
def test_what_is_written_is_on_the_disk_before_it_has_its_name(write: Any, source: Path, tmp_path: Path) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def flushed(handle: int) -> None:
        events.append(f"flush {os.path.basename(os.readlink(f'/proc/self/fd/{handle}')).rpartition('.')[2]}")
        fsync(handle)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return replace(self, target)

    (tmp_path / "out").mkdir()
    with mock.patch.object(os, "fsync", flushed), mock.patch.object(Path, "replace", renamed):
        write(source, tmp_path / "out" / "x.pt")
    assert events == ["flush tmp", "rename", "flush out"]


@every_writer
def test_a_folder_as_the_target_is_said(write: Any, source: Path, tmp_path: Path) -> None:
    (tmp_path / "out.pt").mkdir()
    (tmp_path / "out.safetensors").mkdir()
    with pytest.raises((ValueError, OSError), match=r"out\.\w+ is a folder"):
        write(source, tmp_path / "out.pt")


@pytest.mark.parametrize("out", ["run", "runs/"])
def test_commands_say_that_the_target_is_a_folder(out: str, source: Path, tmp_path: Path) -> None:
    (folder := tmp_path / out).mkdir()
    with pytest.raises(ValueError, match=r"`--out` must be a file, and .* is a folder"):
        combined("soup", [source], folder)
    with pytest.raises(ValueError, match=r"the output must be a file, and .* is a folder"):
        _export(source, folder)


def test_an_exception_in_a_store_leaves_the_old_object() -> None:
    with atomic("memory://writers/x") as file:
        file.write(b"old")

    def interrupted() -> None:
        with replacing("memory://writers/x") as path:
            path.write_bytes(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    with fsspec.open("memory://writers/x", "rb") as found:
        assert found.read() == b"old"


def test_names_are_joined_where_they_are() -> None:
    assert join("s3://bucket/run", "a.ckpt") == "s3://bucket/run/a.ckpt"
    assert join(Path("run"), "a.ckpt") == str(Path("run/a.ckpt"))


def test_what_could_not_be_loaded_by_the_printed_line_is_not_written(tmp_path: Path) -> None:
    import argparse

    state = {"w": torch.ones(1), "a._extra_state": argparse.Namespace(x=1)}
    torch.save({"state_dict": state}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"x.pt was not written: .* does not read back \(argparse.Namespace\)"):
        _export(tmp_path / "a.ckpt", tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_safetensors_say_what_they_cannot_hold(tmp_path: Path) -> None:
    torch.save({"state_dict": {"w": torch.ones(1), "a._extra_state": {"x": 1}}}, tmp_path / "a.ckpt")
    said = export(str(tmp_path / "a.ckpt"), tmp_path / "x.safetensors", None, "", None, force=False)
    assert "which safetensors cannot hold; .pt can: a._extra_state" in said
    assert "strict=False" in said


# ---- through the Trainer


class Tiny(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 1)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch).square().mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(*callbacks: Any, epochs: int = 1, path: Any = None) -> None:
    trainer = pl.Trainer(
        max_epochs=epochs,
        callbacks=list(callbacks),
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Tiny(), DataLoader(torch.ones(8, 2), batch_size=2), ckpt_path=path)


def test_a_run_in_a_store_stays_there_and_goes_on_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saver, ema = ModelCheckpoint("memory://writers/run"), EMA(decay=0.5)
    fit(ema, saver)
    assert ema.final_path == "memory://writers/run/ema-final.ckpt"
    assert torch.equal(read_weights(ema.final_path)["net.weight"], ema.merged_weights()["net.weight"])
    again = EMA(decay=0.5)
    fit(again, ModelCheckpoint("memory://writers/again"), epochs=2, path=saver.best_model_path)
    assert again.updates == 8
    assert not list(tmp_path.iterdir())


WRONG = {
    "no dict": lambda content: content.update({KEY: 3}),
    "averages": lambda content: content[KEY].update(averages=[]),
    "averages.ema": lambda content: content[KEY]["averages"].update(ema=3),
    "averages.ema.updates": lambda content: content[KEY]["averages"]["ema"].update(updates="4"),
    "states": lambda content: content[KEY].update(states=3),
    "states.ema": lambda content: content[KEY]["states"].update(ema=3),
    "raw": lambda content: content[KEY].update(raw=[1]),
    "holds": lambda content: content[KEY].update(holds=None),
    "metrics.x": lambda content: content[KEY].update(metrics={"x": "0.5"}),
    "state of the average `ema`": lambda content: content[KEY]["states"]["ema"].update(state={"average": 3}),
    "the state without a field": lambda content: content[KEY]["states"]["ema"].pop("last_epoch"),
}


@pytest.mark.parametrize("field", WRONG)
def test_a_label_that_was_changed_is_refused_by_file_and_field(field: str, tmp_path: Path) -> None:
    fit(EMA(decay=0.5), ModelCheckpoint(tmp_path, filename="sound"))
    content = torch.load(tmp_path / "sound.ckpt", weights_only=True)
    WRONG[field](content)
    torch.save(content, tmp_path / "forged.ckpt")
    with pytest.raises(ValueError, match=r"forged\.ckpt: ") as error:
        fit(EMA(decay=0.5), epochs=2, path=tmp_path / "forged.ckpt")
    assert field.startswith(("no", "the")) or field in str(error.value)


def test_labels_of_sets_without_states_are_checked_too() -> None:
    label = Label.of({KEY: {"format": FORMAT, "holds": "ema", "measured": False}}, "a.ckpt")
    assert label is not None
    assert label.raw is None
    with pytest.raises(ValueError, match=r"a.ckpt: `score` in the label .* must be int or float, got str"):
        Label.of({KEY: {"format": FORMAT, "holds": "ema", "score": "1"}}, "a.ckpt")
    assert Label.of({"state_dict": {}}, "a.ckpt") is None
    assert Label.of([1], "a.ckpt") is None


DAMAGE: dict[str, Callable[[bytearray], Any]] = {
    "a bit of a tensor": lambda data: data.__setitem__(data.index(_NET) + 6, data[data.index(_NET) + 6] ^ 64),
    "bytes of the pickle": lambda data: data.__setitem__(
        slice(data.index(KEY.encode()), data.index(KEY.encode()) + 4), b"----"
    ),
    "its index": lambda data: data.__setitem__(slice(len(data) - 400, len(data) - 390), b"-" * 10),
    "its end": lambda data: data.__delitem__(slice(len(data) - 30, None)),
}


def _at(data: bytearray, text: str) -> int:
    return data.index(text.encode())


_NET = torch.tensor([[0.625, -0.375]]).numpy().tobytes()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("store", ["disk", "memory://"])
def test_a_damaged_file_is_not_gone_on_from(damage: Any, store: str, tmp_path: Path) -> None:
    fit(EMA(decay=0.5), ModelCheckpoint(tmp_path, filename="sound"))
    content = torch.load(tmp_path / "sound.ckpt", weights_only=True)
    content["state_dict"]["net.weight"] = torch.tensor([[0.625, -0.375]])
    torch.save(content, tmp_path / "damaged.ckpt")
    data = bytearray((tmp_path / "damaged.ckpt").read_bytes())
    damage(data)
    path = str(tmp_path / "damaged.ckpt") if store == "disk" else "memory://writers/damaged.ckpt"
    with fsspec.open(path, "wb") as file:
        file.write(data)
    with pytest.raises((ValueError, RuntimeError), match=r"damaged\.ckpt is (damaged|not a complete)") as error:
        fit(EMA(decay=0.5), epochs=2, path=path)
    assert ("sound.ckpt" in str(error.value)) == (store == "disk")


# ---- a window on disk


@pytest.mark.parametrize(
    "rule", ["WindowMean(k=1, store='disk', directory={!r})", "PowerMeans(sigmas=(0.05, 0.1), every=1, directory={!r})"]
)
def test_a_folder_that_only_the_file_names_is_not_read(rule: str, tmp_path: Path) -> None:
    name = f"{'0' * 16}-{'1' * 16}.pt"
    (tmp_path / "private").mkdir()
    torch.save({"w": torch.full((4,), 42.0)}, tmp_path / "private" / name)
    state = {"snapshots": [name], "checkpointed": [], "updates": 1, "averages": [STATE, STATE], "kept": []}
    about = {"class": "LAWA", "rule": rule.format(str(tmp_path / "private")), "steps": 1, "updates": 1}
    label = {"format": FORMAT, "holds": "raw", "averages": {"lawa": about}, "raw": {}}
    label["states"] = {"lawa": {"state": state, "buffers": {}}}
    torch.save({"state_dict": STATE, KEY: label}, tmp_path / "in.ckpt")
    with pytest.raises(ValueError, match=r"holds no set called 'lawa'.*a folder that only this file names"):
        export(str(tmp_path / "in.ckpt"), tmp_path / "out.pt", "lawa", "", None, force=False)
    assert not (tmp_path / "out.pt").exists()


NAMES = ["../precious.pt", "/precious.pt", "..", "", "a/b.pt", "a\\b.pt", "precious.pt", "precious.ckpt", 3, None]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("where", ["snapshots", "checkpointed"])
def test_names_in_a_checkpoint_lead_nowhere_else(name: Any, where: str, tmp_path: Path) -> None:
    rule = LAWA(k=2, store="disk", directory=str(tmp_path / "window")).rule
    state = rule.init(STATE)
    for _ in range(2):
        rule.update(state, STATE)
    saved = rule.save(state)
    for precious in (tmp_path / "precious.pt", tmp_path / "window" / "precious.pt"):
        torch.save(STATE, precious)
    forged = {**saved, where: [name, name] if where == "snapshots" else [[name]]}
    with pytest.raises(ValueError, match=r"the checkpoint names"):
        rule.load(forged, {})
    assert (tmp_path / "precious.pt").exists()
    assert (tmp_path / "window" / "precious.pt").exists()


def _die(rule: Any, state: Any, steps: int) -> None:
    """Takes in weights in a process that is killed."""
    if not (child := os.fork()):
        for _ in range(steps):
            rule.update(state, STATE)
        os.kill(os.getpid(), 9)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a process")
def test_what_a_killed_run_left_goes_when_it_goes_on_and_nothing_else(tmp_path: Path) -> None:
    window = tmp_path / "window"
    rule = LAWA(k=2, store="disk", directory=str(window)).rule
    state = rule.init(STATE)
    for _ in range(2):
        rule.update(state, STATE)
    saved = rule.save(state)
    (window / "of-another-run.pt").write_bytes(b"theirs")
    (window / f"{'0' * 16}-{'1' * 16}.pt").write_bytes(b"theirs too")
    named = {path.name for path in window.iterdir()}
    _die(rule, rule.load(saved, {}), 5)
    left = {path.name for path in window.iterdir()} - named
    assert len(left) == 2
    (window / f"{state['snapshots'][0][:16]}-{'2' * 16}.pt.ab.tmp").write_bytes(b"half")
    again = rule.load(saved, {})
    assert {path.name for path in window.iterdir()} == named
    rule.update(again, STATE)  # alive, and not in any checkpoint
    alive = {path.name for path in window.iterdir()}
    if not (child := os.fork()):  # another process goes on from the same checkpoint
        for handle in list(snapshots_locks().values()):
            os.close(handle)
        snapshots_locks().clear()
        rule.load(saved, {})
        os._exit(0)
    os.waitpid(child, 0)
    assert {path.name for path in window.iterdir()} == alive


def snapshots_locks() -> dict[str, int]:
    from lightning_merge.rules import _on_disk

    return _on_disk._locks


def test_a_damaged_snapshot_is_refused(tmp_path: Path) -> None:
    rule = LAWA(k=1, store="disk", directory=str(tmp_path)).rule
    state = rule.init(STATE)
    rule.update(state, STATE)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    data[data.index(STATE["w"].numpy().tobytes()) + 6] ^= 64
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"the snapshot .*\.pt cannot be read: it was changed or damaged"):
        rule.result(state)
