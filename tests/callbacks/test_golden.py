"""Files of an earlier version are read, exported and gone on from as by that version: ``tests/golden`` holds them.

A run without any of our callbacks is the yardstick: where it ends bit for bit as it was recorded, all others must. With
another torch or processor it may not; then all are compared to 1e-6, and a warning says so.
"""

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden import pairs, runs, streams
from golden.compare import differing, loaded, sets_in
from processes import launch

from lightning_merge.callbacks import ContinualMerging
from lightning_merge.cli import main
from lightning_merge.compat import read_weights
from lightning_merge.continual import Bank

FILES = [
    *((method, file) for method in runs.METHODS for file in (runs.FULL, runs.WEIGHTS)),
    ("accept-if-better", runs.FINAL),
    ("sharded", pairs.SHARDED),
    ("per_process", pairs.PER_PROCESS),
]


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files, in a folder that no test changes."""
    folder = tmp_path_factory.mktemp("golden")
    shutil.unpack_archive(runs.ARCHIVE, folder)
    return folder


@pytest.fixture(scope="session")
def assert_same(golden: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Any, Any], None]:
    """Compares with what was recorded."""
    _, end = runs.fit("none", tmp_path_factory.mktemp("yardstick"))
    exact = not differing(end, expected(golden, "none")["end"])
    if not exact:
        warnings.warn(
            f"torch {torch.__version__} computes other bits here than torch 2.14.1 where the golden files were written:"
            " what runs end with is compared to 1e-6.",
            stacklevel=2,
        )

    def compare(found: Any, recorded: Any) -> None:
        assert not differing(found, recorded, exact)

    return compare


def expected(golden: Path, method: str) -> dict[str, Any]:
    return torch.load(golden / method / "expected.pt", weights_only=True)


def identical(found: Any, recorded: Any) -> None:
    """For what is only read, on any machine."""
    assert not differing(found, recorded)


@pytest.mark.parametrize(("method", "file"), FILES)
def test_the_same_sets_are_listed_and_read_and_exported(
    method: str, file: str, golden: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    shutil.copytree(golden / method, tmp_path, dirs_exist_ok=True)  # `run` works there, where some keep weights
    code, printed, _ = run("inspect", file)
    assert code == 0
    listed, sets = sets_in(printed), expected(golden, method)["sets"][file]
    assert listed.keys() == sets.keys()
    for name, tensors in sets.items():
        if tensors is None:
            with pytest.raises(ValueError, match=f"holds no set called '{name}'"):
                read_weights(file, name)
            continue
        assert "not in this file" not in listed[name]
        identical(dict(read_weights(file, name)), tensors)
        assert main(["export", file, f"{name}.pt", "--set", name]) == 0
        identical(torch.load(f"{name}.pt", weights_only=True), tensors)


@pytest.mark.parametrize(("method", "file"), [(method, file) for method, file in FILES if method in runs.METHODS])
def test_a_plain_module_loads_the_set_that_is_read_by_default(
    method: str, file: str, golden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(golden / method)
    plain = runs.module(method)
    plain.load_state_dict(torch.load(file, weights_only=True)["state_dict"])
    identical(runs.tensors(plain), dict(read_weights(file)))


@pytest.mark.parametrize("method", runs.METHODS)
def test_a_full_file_is_gone_on_from_to_the_same_end(
    method: str, golden: Path, assert_same: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(golden / method, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)  # where the folders are in which some keep weights
    recorded = expected(golden, method)
    witness, end = runs.fit(method, tmp_path, tmp_path / runs.FULL)
    identical(loaded(witness.started), loaded(recorded["saved"]))
    assert_same(end, recorded["end"])


def test_a_final_file_is_gone_on_from_to_the_same_end(golden: Path, assert_same: Any, tmp_path: Path) -> None:
    recorded = expected(golden, "accept-if-better")
    witness, end = runs.fit("accept-if-better", tmp_path, golden / "accept-if-better" / runs.FINAL, epochs=4)
    identical(witness.started["averages"], recorded["end"]["averages"])
    identical(witness.started["module"], recorded["sets"][runs.FINAL]["raw"])
    assert_same(end, recorded["further"])


@pytest.mark.parametrize("method", [method for method in runs.METHODS if method not in ("none", "onties")])
def test_a_weights_only_file_is_refused_by_a_fit(method: str, golden: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds weights only"):
        runs.fit(method, tmp_path, golden / method / runs.WEIGHTS)


@pytest.mark.parametrize("method", runs.METHODS)
def test_a_score_is_said_to_be_of_the_set_that_was_measured(
    method: str, golden: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    path = golden / method / runs.WEIGHTS
    content = torch.load(path, weights_only=True)
    if "lightning_merge" in content:
        label = content["lightning_merge"]
        assert f"score: val/loss = {label['score']:.6g}, measured on {label['holds']}" in run("inspect", path)[1]


# ---- streams and banks


def test_a_stream_goes_on_with_a_third_task(golden: Path, assert_same: Any, tmp_path: Path) -> None:
    shutil.copytree(golden / "stream" / "bank-of-two", tmp_path / "bank")
    first, second, third = expected(golden, "stream")["ends"]
    bank = Bank(tmp_path / "bank", keep_vectors=True)
    assert bank.tasks == second["tasks"]
    assert bank.verify() == []
    identical(runs.tensors(bank.result() or {}), second["vector"])
    module = runs.Tiny()
    ContinualMerging("magmax", tmp_path / "bank", keep_vectors=True).load_merged(module)
    identical(runs.tensors(module), second["module"])
    identical(dict(read_weights(golden / "stream" / streams.MERGED)), second["module"])

    assert_same(streams.stream_task(2, tmp_path), third)
    bank = Bank(tmp_path / "bank", keep_vectors=True)
    for task in bank.tasks[1:]:
        bank.remove(task)
    identical(runs.tensors(bank.result() or {}), first["vector"])


def test_a_task_of_a_stream_is_gone_on_from_to_the_same_end(golden: Path, assert_same: Any, tmp_path: Path) -> None:
    shutil.copytree(golden / "stream" / "bank-of-one", tmp_path / "bank")
    found = streams.stream_task(1, tmp_path, golden / "stream" / streams.TASK)
    assert_same(found, expected(golden, "stream")["ends"][1])


@pytest.mark.parametrize("preset", streams.COMBINERS)
def test_a_bank_of_each_combiner_takes_another_vector(
    preset: str, golden: Path, assert_same: Any, tmp_path: Path
) -> None:
    shutil.copytree(golden / "banks" / preset, tmp_path, dirs_exist_ok=True)
    recorded = expected(golden, "banks")[preset]
    assert Bank(tmp_path, keep_vectors=preset == "average").combiner == streams.bank(preset, tmp_path).combiner
    bank = streams.bank(preset, tmp_path)
    assert bank.tasks == [0, 1]
    assert bank.verify() == []
    assert_same(bank.result(), recorded["two"])
    bank.add(list(streams.vectors())[2], task=2)
    if preset == "wise-ft":  # gives the last vector with all its digits since
        assert not differing(bank.result(), recorded["three"], exact=False)
    else:
        assert_same(bank.result(), recorded["three"])


# ---- several processes


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("run", "file", "epochs"), [(pairs.sharded, pairs.SHARDED, 2), (pairs.per_process, pairs.PER_PROCESS, 3)]
)
def test_two_processes_go_on_to_the_same_end(
    run: Any, file: str, epochs: int, golden: Path, assert_same: Any, tmp_path: Path
) -> None:
    found = launch(2, run, tmp_path, epochs, golden / run.__name__ / file)
    for rank, recorded in enumerate(expected(golden, run.__name__)["ranks"]):
        identical(loaded(found[rank]["start"]), loaded(recorded["start"]))
        assert_same(found[rank]["end"], recorded["end"])
