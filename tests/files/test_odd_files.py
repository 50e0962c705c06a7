"""What is said of files that are odd, and that the printed lines load what they say."""

import argparse
import os
import re
import resource
import signal
import subprocess
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from lightning_merge._commands._export import export
from lightning_merge._commands._inspect import describe
from lightning_merge._commands._target import save
from lightning_merge.compat import read_weights
from lightning_merge.files import check
from lightning_merge.trajectory import Checkpoint


def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 2)


def written(path: Path, **besides: Any) -> Path:
    torch.save({"state_dict": model().state_dict(), "pytorch-lightning_version": "2.6.0", **besides}, path)
    return path


def loads(text: str) -> bool:
    """Whether the printed line puts the weights into a fresh module."""
    found = re.search(r"  load: (.*)", text)
    assert found is not None, text
    fresh = nn.Linear(3, 2)
    exec(found[1], {"torch": torch, "safetensors": safetensors, "model": fresh})
    return all(torch.equal(a, b) for a, b in zip(fresh.parameters(), model().parameters(), strict=True))


READERS = [read_weights, describe, lambda path: Checkpoint(path).weights(), check]


class Config:
    pass


@pytest.mark.parametrize(
    "value",
    [nn.Linear(2, 2), Config(), Config, argparse.Namespace(a=1), np.ones(2), Path("x"), frozenset({1}), print],
    ids=lambda value: type(value).__name__,
)
def test_inspect_prints_a_line_that_loads_whatever_is_beside_the_weights(value: Any, tmp_path: Path) -> None:
    assert loads(describe(written(tmp_path / "a.ckpt", hyper_parameters={"x": value})))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
@pytest.mark.parametrize("nested", [True, False])
def test_inspect_prints_a_line_that_loads_wrapped_names(prefix: str, nested: bool, tmp_path: Path) -> None:
    state = {prefix + name: tensor for name, tensor in model().state_dict().items()}
    torch.save({"state_dict": state} if nested else state, tmp_path / "a.pt")
    assert loads(describe(tmp_path / "a.pt"))


def runs_as_typed(line: str) -> None:
    """Runs ``python -c CODE``: a shell takes the line apart, and this process runs the code: no start of torch."""
    words = subprocess.run(line.replace("python", "printf '%s\\0'", 1), shell=True, check=True, capture_output=True)
    option, code, end = os.fsdecode(words.stdout).split("\0")
    assert (option, end) == ("-c", "")
    exec(code, {"__name__": "__main__"})


@pytest.mark.parametrize("folder", ["a b", "it's", 'so "called"', "two\nlines", "back\\slash", "$HOME", "日本"])
def test_printed_lines_work_whatever_the_name(folder: str, tmp_path: Path) -> None:
    place = tmp_path / folder
    place.mkdir()
    source = written(place / "a.ckpt")
    assert loads(describe(source))
    for name in ("o.pt", "o.safetensors"):
        assert loads(export(str(source), place / name, None, "", None, False))
    torch.save(model(), place / "whole.pt")
    with pytest.raises(ValueError, match="convert it once") as raised:
        describe(place / "whole.pt")
    runs_as_typed(str(raised.value).partition("\n  ")[2])
    assert (place / "whole.weights.pt").is_file()


def test_a_merge_is_not_called_foreign(tmp_path: Path) -> None:
    written(tmp_path / "a.pt", provenance={"rule": "uniform", "files": ["x", "y"]})
    assert "written by lightning-merge: uniform of 2 checkpoints" in describe(tmp_path / "a.pt")


def test_what_holds_itself_ends_no_reader(tmp_path: Path) -> None:
    loop: list[Any] = []
    loop.append(loop)
    assert loads(describe(written(tmp_path / "a.ckpt", hyper_parameters={"x": loop})))


def test_tensors_that_are_not_read_in_parts_are_in_nobodys_way_beside_the_weights(tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt", hyper_parameters={"x": torch.eye(2).to_sparse()}, global_step=7)
    checkpoint = Checkpoint(path)
    assert checkpoint.step == 7
    assert torch.equal(checkpoint.weights()["weight"], model().weight)


# ---- damage of the index


def _twice(path: Path) -> None:
    with zipfile.ZipFile(path) as parts:
        name = next(name for name in parts.namelist() if name.endswith("/data/0"))
        content = parts.read(name)
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as parts:
        parts.writestr(name, b"\0" * len(content))


def _flip(place: int) -> Any:
    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[place] ^= 1 << 6
        path.write_bytes(content)

    return damage


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("damage", [_twice, _flip(-3), _flip(-18), _flip(-25), _flip(-38), _flip(-57)])
def test_a_damaged_index_is_called_damaged(damage: Any, reader: Any, tmp_path: Path) -> None:
    path = written(tmp_path / "a.ckpt")
    damage(path)
    try:
        reader(path)
    except ValueError as error:
        assert re.search("is damaged|was cut short", str(error))  # noqa: PT017 (some bits say nothing)
    else:
        assert all(torch.equal(value, model().state_dict()[name]) for name, value in read_weights(path).items())


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["a.ckpt", "a.safetensors"])
def test_a_pipe_is_not_waited_for(name: str, reader: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match="is a pipe"):
        reader(tmp_path / name)


def test_a_link_that_leads_nowhere_is_called_that(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").symlink_to("best.ckpt")
    with pytest.raises(ValueError, match=r"is a link to best.ckpt, where there is no file\.$"):
        read_weights(tmp_path / "last.ckpt")


# ---- writing


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """Files of this process may be no larger."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("name", ["o.pt", "o.safetensors"])
def test_what_the_system_refuses_in_mid_write_is_named_and_nothing_is_left(name: str, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(30_000)}, tmp_path / "a.pt")
    target = tmp_path / name
    target.write_bytes(b"old")
    with small_disk(20_000), pytest.raises(OSError, match=f"{name} was not written: File too large"):
        export(str(tmp_path / "a.pt"), target, None, "", None, True)
    assert target.read_bytes() == b"old"
    assert sorted(each.name for each in tmp_path.iterdir()) == sorted(["a.pt", name])


def test_a_place_where_no_file_can_be_made_is_named() -> None:
    with pytest.raises(OSError, match=r"/proc/x.pt was not written: "):
        save({}, "/proc/x.pt")


# ---- stores


@pytest.mark.parametrize(
    ("url", "says"),
    [("memory://none/x.ckpt", "there is no such file"), ("nosuch://x/y.ckpt", "leads to no store")],
)
def test_stores_that_do_not_answer_are_named(url: str, says: str) -> None:
    with pytest.raises((ValueError, OSError), match=f"{url}.*{says}"):
        read_weights(url)


def test_a_line_for_a_file_in_a_store_reads_it_there(tmp_path: Path) -> None:
    for name in ("o.pt", "o.safetensors"):
        assert loads(export(str(written(tmp_path / "a.ckpt")), f"memory://lines/{name}", None, "", None, True))
    assert loads(describe("memory://lines/o.pt"))


# ---- layouts under DDP


def test_sets_of_other_libraries_are_found_under_ddp(tmp_path: Path) -> None:
    raw = model().state_dict()
    average = {name: tensor + 1 for name, tensor in raw.items()}

    def named(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {prefix + name: tensor for name, tensor in state.items()}

    aside = named("module.module.", raw)
    pair = {**named("module.ema_model.", average), **named("module.online_model.", raw), "module.step": torch.tensor(2)}
    torch.save({"state_dict": average, "ema_state_dict": {"steps": torch.tensor(2), **aside}}, tmp_path / "mmengine.pt")
    torch.save(pair, tmp_path / "ema_pytorch.pt")
    for path in tmp_path.iterdir():
        for name, expected in (("raw", raw), ("average", average)):
            found = read_weights(path, name)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], expected[key]) for key in expected)
