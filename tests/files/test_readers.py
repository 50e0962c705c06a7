"""What every reader of files does with sound, strange, damaged and unreachable ones."""

import contextlib
import errno
import functools
import io
import os
import pickle
import re
import resource
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

import foreign_files
import fsspec
import pytest
import torch
from omegaconf import OmegaConf
from readers import ALL, OF_WEIGHTS, STRICT, combined, equal
from torch import Tensor, nn

from lightning_merge._commands._export import export
from lightning_merge._commands._inspect import describe
from lightning_merge.compat import read_weights
from lightning_merge.files import _unpickler, check, read
from lightning_merge.files._check import naming
from lightning_merge.files._layouts import open_file
from lightning_merge.optim import OnDARE
from lightning_merge.rules import Interpolation
from lightning_merge.trajectory import Checkpoint, Trajectory

WEIGHTS = {"net.weight": torch.arange(6.0).view(2, 3), "net.bias": torch.tensor([0.5, -0.5])}


def by_name(readers: dict[str, Any]) -> Any:
    return pytest.mark.parametrize("reader", readers.values(), ids=readers.keys())


# ---- objects of classes


class Colour(Enum):
    RED = 1


class Settings(dict):  # type: ignore[type-arg]
    """A dict of a class of its own, with an attribute."""

    def __init__(self, **values: Any) -> None:
        super().__init__(**values)
        self.frozen = True


class Touches:
    """Leaves a file behind if it is unpickled."""

    def __reduce__(self) -> Any:
        return Path.touch, (Path("was-run"),)


OBJECTS: dict[str, Any] = {
    "a network": nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)),
    "a class": nn.Linear,
    "a function": torch.relu,
    "a partial function": functools.partial(torch.relu, inplace=True),
    "a node of OmegaConf": OmegaConf.create({"lr": 0.1, "layers": [1, {"width": 2}]}),
    "an enumeration": Colour.RED,
    "a dict of a class of its own": Settings(lr=0.1),
    "a path": Path("data"),
    "a set of objects": {Colour.RED, Path("x")},
    "something that acts": Touches(),
}


@by_name(ALL)
@pytest.mark.parametrize("value", OBJECTS.values(), ids=OBJECTS.keys())
def test_objects_among_hyperparameters_are_in_nobodys_way_and_do_nothing(
    value: Any, reader: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    content = {"state_dict": WEIGHTS, "hyper_parameters": {"lr": 0.1, "it": value}, "global_step": 3, "epoch": 0}
    torch.save(content, path := tmp_path / "objects.ckpt")
    found = reader(path, tmp_path)
    if reader in OF_WEIGHTS.values():
        assert equal(found, WEIGHTS)
    assert not Path("was-run").exists()


def test_inspect_says_what_was_not_read(tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "hyper_parameters": {"lr": 0.1, "net": nn.Linear(1, 1)}}
    torch.save(content, path := tmp_path / "a.ckpt")
    assert "`hyper_parameters.net` (torch.nn.modules.linear.Linear)" in describe(path)
    assert read(path)["hyper_parameters"]["lr"] == 0.1


def test_tensors_in_dicts_of_a_class_of_their_own_are_read(tmp_path: Path) -> None:
    torch.save({"state_dict": Settings(**WEIGHTS)}, path := tmp_path / "a.ckpt")
    assert equal(read_weights(path), WEIGHTS)
    assert equal(Checkpoint(path).weights(), WEIGHTS)


@pytest.mark.parametrize("kind", ["sparse", "quantised"])
@pytest.mark.parametrize("reader", [OF_WEIGHTS["average"], OF_WEIGHTS["soup"], OF_WEIGHTS["Trajectory"]])
def test_what_has_no_mean_is_refused_by_name(kind: str, reader: Any, tmp_path: Path) -> None:
    odd = (
        torch.eye(2).to_sparse() if kind == "sparse" else torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    )
    torch.save({"state_dict": {**WEIGHTS, "odd": odd}, "global_step": 1}, path := tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=rf"a.ckpt: `odd` is a {kind} tensor"):
        reader(path, tmp_path)
    assert export(str(path), tmp_path / "b.pt", None, "", None, force=False)


@pytest.mark.parametrize("kind", ["sparse", "quantised", "shape and no numbers"])
@pytest.mark.parametrize("command", ["diff", "doctor", "soup", "export"])
def test_every_command_names_what_it_cannot_take(kind: str, command: str, run: Any, tmp_path: Path) -> None:
    odd = {
        "sparse": torch.eye(2).to_sparse(),
        "quantised": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
        "shape and no numbers": torch.ones(2, device="meta"),
    }[kind]
    torch.save({**WEIGHTS, "odd": odd}, path := tmp_path / "a.pt")
    out = tmp_path / "out.pt"
    after = {"soup": ["--out", out], "export": [tmp_path / "out.safetensors"]}.get(command, [])
    code, _, err = run(command, path, *([] if command == "export" else [path]), *after)
    assert code == 2
    assert re.search(rf"a.pt: `odd` (is|has) a {kind}", err)
    assert len(err.strip().splitlines()) == 1


def test_a_store_that_gives_the_name_alone_is_said_more_of() -> None:
    url = "https://host/a.ckpt"
    with pytest.raises(OSError, match=r"a\.ckpt cannot be read now: there is no such file"), naming(url):
        raise FileNotFoundError(url)


def test_programs_are_called_programs(tmp_path: Path) -> None:
    torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)).save(path := str(tmp_path / "a.pt"))
    with pytest.raises(ValueError, match=r"a.pt is a program \(TorchScript\)"):
        read(path)


class Mine(Tensor):
    """A tensor of a class of its own."""


def test_tensors_of_a_class_of_their_own_are_read_as_plain_ones(tmp_path: Path) -> None:
    mine = torch.ones(3).as_subclass(Mine)
    torch.save({"state_dict": {"w": nn.Parameter(torch.ones(2)), "m": mine}}, path := tmp_path / "a.ckpt")
    found = read_weights(path)
    assert {name: (type(t), t.tolist()) for name, t in found.items() if name == "m"} == {"m": (Tensor, [1, 1, 1])}


class Reduces:
    def __init__(self, *parts: Any) -> None:
        self.parts = parts

    def __reduce__(self) -> Any:
        return self.parts


HOSTILE = {
    "a command": Reduces(os.system, ("touch was-run",)),
    "evaluated text": Reduces(eval, ("open('was-run', 'w')",)),
    "an attribute of a class that is let through": Reduces(getattr, (torch.Tensor, "tofile")),
    "a call of an attribute": Reduces(functools.partial, (os.mkdir, "was-run")),
}


@pytest.mark.parametrize("value", HOSTILE.values(), ids=HOSTILE.keys())
def test_what_would_run_is_refused_or_stands_still(value: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": WEIGHTS, "it": [value]}, "a.ckpt")
    with contextlib.suppress(ValueError):
        assert equal(read("a.ckpt")["state_dict"], WEIGHTS)
    assert not Path("was-run").exists()


@pytest.mark.parametrize("name", ["torch._utils\n_rebuild_tensor_v2", "torch\nSize", "collections\nOrderedDict"])
def test_what_is_shared_with_the_process_gets_no_attributes(name: str) -> None:
    text = b"\x80\x02c" + name.encode() + b"\nN}X\x01\x00\x00\x00xK\x01s\x86b."  # BUILD with attributes in slots
    with pytest.raises(pickle.UnpicklingError):
        _unpickler.load(io.BytesIO(text))


def test_the_cure_for_a_file_that_is_refused_keeps_all_of_its_sets(tmp_path: Path) -> None:
    content = {"state_dict": WEIGHTS, "hyper_parameters": Reduces(os.system, ("true",)), "lightning_merge": {"raw": {}}}
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="convert it once") as error:
        read(tmp_path / "a.ckpt")
    command = str(error.value).partition('-c "')[2].removesuffix('"')
    exec(command)
    kept = torch.load(tmp_path / "a.weights.pt", weights_only=True)
    assert kept.keys() == {"state_dict", "lightning_merge"}


def test_a_sharded_folder_whose_description_would_run_code_is_refused(tmp_path: Path) -> None:
    (folder := tmp_path / "step=1.ckpt").mkdir()
    torch.save({}, folder / "meta.pt")
    (folder / ".metadata").write_bytes(pickle.dumps(Reduces(os.system, (f"touch {tmp_path}/was-run",))))
    for reader in (read, check, describe):
        with pytest.raises(ValueError, match=r"\.metadata names (posix|nt)\.system"):
            reader(folder)
    assert not (tmp_path / "was-run").exists()


# ---- damage


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(WEIGHTS["net.weight"].numpy().tobytes()) + 6] ^= 64
    path.write_bytes(data)


def in_the_pickle(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"net.bias") + 3] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


DAMAGE = {"a bit of a tensor": flipped, "a bit of the pickle": in_the_pickle, "its end is missing": cut}


@by_name(STRICT)
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_file_is_refused_by_name(damage: Any, reader: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "global_step": 1, "epoch": 0}, path := tmp_path / "bad.ckpt")
    damage(path)
    with pytest.raises((ValueError, RuntimeError), match=r"bad.ckpt"):
        reader(path, tmp_path)
    assert not [*tmp_path.glob("*.pt"), *tmp_path.glob("*.tmp")]


def test_sound_files_beside_a_damaged_one_are_named_and_damaged_ones_are_not(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        torch.save({"state_dict": WEIGHTS}, tmp_path / f"{name}.ckpt")
    flipped(tmp_path / "a.ckpt")
    flipped(tmp_path / "b.ckpt")
    with pytest.raises(ValueError, match=r"a.ckpt is damaged: .*resume from another file: .*c.ckpt") as error:
        read(tmp_path / "a.ckpt")
    assert "b.ckpt" not in str(error.value)


@by_name(STRICT)
def test_a_file_without_checksums_is_read(reader: Any, tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        torch.save({"state_dict": WEIGHTS}, path := tmp_path / "a.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    reader(path, tmp_path)


# ---- what the system refuses


REFUSALS = [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error"), (errno.ENOMEM, "Cannot allocate")]


@by_name(ALL)
@pytest.mark.parametrize(("number", "reason"), REFUSALS)
def test_what_the_system_refuses_is_not_called_damage(number: int, reason: str, reader: Any, tmp_path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "global_step": 1, "epoch": 0}, path := tmp_path / "a.ckpt")
    error = OSError(number, os.strerror(number))
    with mock.patch("torch.load", side_effect=error), pytest.raises(OSError, match=rf"a.ckpt .*{reason}") as found:
        reader(path, tmp_path)
    assert "cut short" not in str(found.value)


@pytest.mark.parametrize("others", [0, 200])
def test_more_files_are_merged_than_may_be_open(tmp_path: Path, others: int) -> None:
    of_others = [open(os.devnull, "rb") for _ in range(others)]  # noqa: SIM115 - closed at the end
    for step in range(60):
        torch.save({"state_dict": {"w": torch.full((2,), float(step))}, "global_step": step}, tmp_path / f"{step}.ckpt")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 64
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 30, hard))
    try:
        merged = Trajectory.of_run(tmp_path).combine([1 / 60] * 60)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for file in of_others:
            file.close()
    torch.testing.assert_close(merged["w"], torch.full((2,), 29.5))


# ---- what is in a file besides the numbers


class Counting(nn.Module):
    """Keeps a dict beside its tensors, and in ``note`` a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen, self.note = nn.Linear(2, 2), {"batches": 0}, Note()

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


class Note(nn.Module):
    def get_extra_state(self) -> Any:
        return torch.tensor([1.5, 2.5])

    def set_extra_state(self, state: Any) -> None:
        assert state.tolist() == [1.5, 2.5]


@by_name(OF_WEIGHTS)
def test_what_modules_keep_beside_their_tensors_survives(reader: Any, tmp_path: Path) -> None:
    module = Counting()
    module.seen = {"batches": 7}
    torch.save({"state_dict": module.state_dict(), "global_step": 1, "epoch": 0}, path := tmp_path / "a.ckpt")
    fresh = Counting()
    fresh.load_state_dict(reader(path, tmp_path))
    assert fresh.seen == {"batches": 7}


def test_extra_state_of_a_merge_is_that_of_the_last_file(tmp_path: Path) -> None:
    for step in (1, 2):
        state = {"w": torch.full((1,), float(step)), "a._extra_state": {"at": step}}
        torch.save({"state_dict": state, "global_step": step}, tmp_path / f"{step}.ckpt")
    files = [tmp_path / "1.ckpt", tmp_path / "2.ckpt"]
    assert combined("soup", files, tmp_path / "s.pt") == {"w": torch.tensor([1.5]), "a._extra_state": {"at": 2}}
    assert combined("average", [tmp_path], tmp_path / "a.pt")["a._extra_state"] == {"at": 2}


# ---- names


NAMES = {
    "a compiled part": lambda name: f"net._orig_mod.{name}",
    "a compiled whole": lambda name: f"_orig_mod.net.{name}",
    "wrapped by DDP": lambda name: f"module.net.{name}",
    "compiled, then wrapped": lambda name: f"module._orig_mod.net.{name}",
    "wrapped, then compiled": lambda name: f"_orig_mod.module.net.{name}",
}


@by_name(OF_WEIGHTS)
@pytest.mark.parametrize("wrapped", NAMES.values(), ids=NAMES.keys())
def test_names_are_those_of_a_plain_module(wrapped: Any, reader: Any, tmp_path: Path) -> None:
    state = {wrapped(name.removeprefix("net.")): tensor for name, tensor in WEIGHTS.items()}
    torch.save({"state_dict": state, "global_step": 1, "epoch": 0}, path := tmp_path / "a.ckpt")
    assert equal(reader(path, tmp_path), WEIGHTS)


@pytest.mark.parametrize("wrapped", NAMES.values(), ids=NAMES.keys())
def test_a_base_and_an_anchor_of_a_wrapped_module_are_taken(wrapped: Any, tmp_path: Path) -> None:
    state = {wrapped(name.removeprefix("net.")): tensor for name, tensor in WEIGHTS.items()}
    torch.save({"state_dict": state}, path := tmp_path / "a.ckpt")
    assert equal(Interpolation(anchor=str(path)).init(WEIGHTS)["anchor"], WEIGHTS)
    module = nn.ModuleDict({"net": nn.Linear(3, 2)})
    OnDARE(torch.optim.SGD(module.parameters(), lr=0.1), reference=module, pretrained=path)


def test_a_module_called_module_keeps_its_name_in_files_of_lightning(tmp_path: Path) -> None:
    state = {f"module.{name}": tensor for name, tensor in WEIGHTS.items()}
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6"}, path := tmp_path / "a.ckpt")
    assert read_weights(path).keys() == state.keys()


@pytest.mark.parametrize("library", ["timm", "ema_pytorch", "nemo", "mmengine"])
@pytest.mark.parametrize("weights", ["published", "raw"])
def test_a_trajectory_takes_the_sets_that_inspect_names(library: str, weights: Any, tmp_path: Path) -> None:
    path, expected = getattr(foreign_files, library)(tmp_path)
    wanted = "raw" if weights == "raw" else open_file(path).default
    found = Checkpoint(path, weights).weights()
    assert equal(found, dict(expected[wanted]))
    assert equal(dict(read_weights(path, wanted)), found)


# ---- stores


def test_a_file_in_a_store_is_read_and_written_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with fsspec.open("memory://files/run/a.ckpt", "wb") as file:
        torch.save({"state_dict": WEIGHTS}, file)
    assert equal(read_weights("memory://files/run/a.ckpt"), WEIGHTS)
    assert "memory://files/run/a.ckpt" in describe("memory://files/run/a.ckpt")
    check("memory://files/run/a.ckpt")
    for suffix in (".pt", ".safetensors"):
        export("memory://files/run/a.ckpt", f"memory://files/out/x{suffix}", None, "", None, force=False)
        assert equal(read_weights(f"memory://files/out/x{suffix}"), WEIGHTS)
        with pytest.raises(ValueError, match=r"exists already; --force"):
            export("memory://files/run/a.ckpt", f"memory://files/out/x{suffix}", None, "", None, force=False)
    assert not list(tmp_path.iterdir())
    with fsspec.open("memory://files/run/a.ckpt", "rb") as file:
        data = bytearray(file.read())
    data[data.index(WEIGHTS["net.weight"].numpy().tobytes()) + 6] ^= 64
    with fsspec.open("memory://files/run/bad.ckpt", "wb") as file:
        file.write(data)
    for reader in (read_weights, check):
        with pytest.raises(ValueError, match=r"memory://files/run/bad.ckpt is damaged"):
            reader("memory://files/run/bad.ckpt")
    with pytest.raises(OSError, match=r"memory://files/run/none.ckpt"):
        read_weights("memory://files/run/none.ckpt")
