"""Every command on every layout of a corpus: right, or one sentence that names the file, never as damaged."""

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from corpus import CORPUS, EMA, Detector, W

from lightning_merge.files._folders import read_parts
from lightning_merge.files._layouts import open_file
from lightning_merge.trajectory import Checkpoint

Run = Callable[..., Any]

COMMANDS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "inspect": lambda path, out: ["inspect", path],
    "export": lambda path, out: ["export", path, out],
    "soup": lambda path, out: ["soup", path, path, "--out", out],
    "average": lambda path, out: [
        *("average", path.parent, "--pattern", path.name, "--weights", "published", "--out", out)
    ],
    "diff": lambda path, out: ["diff", path, path],
    "doctor": lambda path, out: ["doctor", path, path],
    "verify": lambda path, out: ["verify", path],
    "unlearn": lambda path, out: ["unlearn", path, "--task", "task1"],
}
_OF_RUNS = ("verify", "unlearn")  # which want the folder of a run, and refuse all else


def test_the_corpus_is_as_large_as_promised() -> None:
    assert len(CORPUS) >= 25


@pytest.mark.parametrize("layout", CORPUS)
def test_every_command_is_right_about_every_layout_or_says_what_it_is(layout: str, run: Run, tmp_path: Path) -> None:
    path, expected = CORPUS[layout](tmp_path)
    for number, (command, arguments) in enumerate(COMMANDS.items()):
        out = tmp_path / f"out-{number}.pt"
        code, said, err = run(*arguments(path, out))
        assert not re.search(r"damaged|cut short|Traceback", said + err), (command, err)
        if command in _OF_RUNS or (isinstance(expected, str) and command != "inspect"):
            assert code == 2, command
            assert path.name in err
            assert err.startswith("lightning-merge: error: ")
            assert len(err.strip().splitlines()) <= 2, err  # a sentence, and perhaps the line that converts it
            assert command in _OF_RUNS or re.search(str(expected), err), (command, err)
            assert not out.exists()
        elif not isinstance(expected, str):
            assert code == 0, (command, err)
            if out.exists():
                found = torch.load(out, weights_only=True)
                found = found.get("state_dict", found)
                assert found.keys() == expected.keys(), command
                assert all(found[name].equal(tensor) for name, tensor in expected.items()), command


@pytest.mark.parametrize("layout", [name for name in CORPUS if "ema" in name.lower() or name in ("timm", "BasicSR")])
def test_raw_weights_are_taken_where_a_file_has_both(layout: str, tmp_path: Path) -> None:
    path, expected = CORPUS[layout](tmp_path)
    if expected is EMA:
        for weights, held in (("raw", W), ("published", EMA)):
            found = Checkpoint(path, weights).weights()
            assert all(found[name].equal(tensor) for name, tensor in held.items())


@pytest.mark.parametrize("layout", ["detectron2", "model_state_dict", "Composer", "fairseq", "DeepSpeed"])
def test_a_set_under_a_key_counts_as_raw(layout: str, tmp_path: Path) -> None:
    assert Checkpoint(CORPUS[layout](tmp_path)[0], "raw").weights().keys() == W.keys()


@pytest.mark.parametrize("layout", ["ultralytics", "a pickled module", "detectron2's model zoo"])
def test_the_line_that_converts_a_file_gives_one_that_all_commands_read(layout: str, run: Run, tmp_path: Path) -> None:
    (place := tmp_path / "it's here").mkdir()
    path, _ = CORPUS[layout](place)
    _, _, err = run("inspect", path)
    line = err.strip().splitlines()[-1].strip()
    assert line.startswith("python -c ")
    command = line.replace("python", sys.executable, 1)
    subprocess.run(command, shell=True, check=True, cwd=Path(__file__).parent)
    plain = path.with_name(f"{path.stem}.weights.pt")
    for name, arguments in COMMANDS.items():
        if name not in _OF_RUNS:
            code, _, err = run(*arguments(plain, tmp_path / f"{name}.pt"))
            assert code == 0, (name, err)
    if layout != "detectron2's model zoo":
        soup = torch.load(tmp_path / "soup.pt", weights_only=True)["state_dict"]
        assert all(soup[name].equal(tensor) for name, tensor in Detector().state_dict().items())


def test_shards_that_lack_something_are_named(tmp_path: Path) -> None:
    folder, _ = CORPUS["transformers, sharded"](tmp_path)
    first, second = sorted(folder.glob("*.safetensors"))
    index = folder / "model.safetensors.index.json"
    safetensors.torch.save_file({"other": torch.ones(1)}, first)
    with pytest.raises(ValueError, match=f"{first.name} is not that of .*: it lacks `net.weight`"):
        read_parts(index)
    second.unlink()
    with pytest.raises(ValueError, match=f"index of shards, of which there is no {second.name}: copy all"):
        open_file(folder)
    index.write_text('{"weight_map": {"w": "../../elsewhere.safetensors"}}')
    with pytest.raises(ValueError, match="has no `weight_map` of tensors to files beside it"):
        open_file(index)


def test_hashes_of_a_model_in_parts_are_those_of_all_parts(tmp_path: Path) -> None:
    index, _ = CORPUS["the index of shards"](tmp_path)
    before = Checkpoint(index).sha256()
    assert Checkpoint(index.parent).sha256() == before
    shard = next(index.parent.glob("*-00001-*"))
    (name,) = safetensors.torch.load_file(shard)
    safetensors.torch.save_file({name: W[name] + 1}, shard)
    assert Checkpoint(index).sha256() != before


def test_parts_of_a_distributed_checkpoint_that_lack_are_named(tmp_path: Path) -> None:
    folder, _ = CORPUS["torch.distributed"](tmp_path)
    part = next(folder.glob("*.distcp"))
    shutil.move(part, tmp_path / "elsewhere")
    with pytest.raises(ValueError, match=f"lacks parts, or they were cut short: {part.name}"):
        open_file(folder)
