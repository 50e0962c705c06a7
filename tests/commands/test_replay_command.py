"""``lightning-merge replay``: a configured run, shortened, and what it answers."""

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lightning_merge._commands import _replay

MINE = """
seed_everything: 1
trainer: {max_epochs: 30, accelerator: cpu, callbacks: [{class_path: lightning_merge.recipes.RunReport}]}
model:
  class_path: lightning_merge.recipes.Classifier
  init_args: {num_classes: 10, model: {class_path: lightning_merge.recipes.SmallConvNet, init_args: {width: 4}}}
data: {class_path: lightning_merge.recipes.Digits}
ckpt_path: null
"""
SHORT = ("--epochs", 2, "--batches", 2)
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new process takes seconds to import what it needs."""

    def here(config: Path, log: Path, recorder: dict[str, Any], file: Path | None) -> Any:
        _replay._record(config, log, recorder, file)
        return json.loads(log.read_text())

    monkeypatch.setattr(_replay, "_in_a_new_process", here)


@pytest.mark.usefixtures("_in_this_process")
def test_a_recipe_that_resumes_ends_with_0(run: Run) -> None:
    code, out, err = run("replay", "digits/swa", *SHORT)
    assert code == 0, err
    assert out.splitlines()[-1] == "resumes bit for bit: 4 points before and after batches are the same."
    assert out.startswith("digits/swa: 2 epochs of 2 batches, and again from the end of epoch 0 in a new process")
    assert list(Path().iterdir()) == []


@pytest.mark.usefixtures("_in_this_process")
def test_a_run_folder_that_does_not_ends_with_1_and_the_cure(run: Run) -> None:
    Path("version_0").mkdir()
    Path("version_0/config.yaml").write_text(MINE)
    code, out, _ = run("replay", "version_0", *SHORT)
    assert code == 1
    assert "does not resume bit for bit: first difference before batch 0 of epoch 1" in out
    assert "random state torch" in out
    assert out.splitlines()[-1].endswith("(torchdata's StatefulDataLoader).")
    code, out, _ = run("replay", "version_0/config.yaml", *SHORT, "--epoch", 1, "--batch", 0)
    assert code == 1
    assert "and again from batch 0 of epoch 1" in out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["nowhere"], "there is no run folder nowhere, and no recipe is called 'nowhere'"),
        (["nowhere.yaml"], "there is no file nowhere.yaml"),
        (["."], "there is no file config.yaml"),
        (["digits/swa", "--epochs", 1], "`--epochs` must be at least 2"),
        (["digits/swa", "--epoch", 3], "`--epoch` must be at most 2"),
        (["digits/swa", "--batch", 8], "`--batch` must be at most 7"),
    ],
    ids=str,
)
def test_a_mistake_is_named(arguments: list[Any], part: str, run: Run) -> None:
    code, _, err = run("replay", *arguments)
    assert code == 2
    assert part in err


@pytest.mark.slow
def test_a_run_is_recorded_in_a_new_process(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    short = f"max_epochs: 1, limit_train_batches: 2, default_root_dir: {tmp_path}"
    config.write_text(MINE.replace("max_epochs: 30", short).replace("ckpt_path: null", ""))
    found = _replay._in_a_new_process(config, tmp_path / "log.json", {}, None)
    assert len(found) == 4  # before and after each batch


@pytest.mark.slow
def test_both_halves_run_in_new_processes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    fork = multiprocessing.get_context("fork")  # has imported what it needs
    monkeypatch.setattr(_replay.multiprocessing, "get_context", lambda method: fork)
    Path("mine.yaml").write_text(MINE.replace("recipes.RunReport", "callbacks.RandomState"))
    code, out, err = run("replay", "mine.yaml", *SHORT)
    assert code == 0, err
    assert "resumes bit for bit" in out
    Path("mine.yaml").write_text(MINE.replace("num_classes: 10", "num_classes: 1"))
    code, _, err = run("replay", "mine.yaml", *SHORT)
    assert code == 2
    assert "the run failed; its error is above." in err
