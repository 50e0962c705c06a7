"""A whole stream from the command line: it runs, goes on, refuses what does not fit, and unlearns."""

import itertools
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_images import write_images

from lightning_merge.cli import main
from lightning_merge.combiners import add_vector, ethos, ext_sub
from lightning_merge.continual import Bank, StreamState
from lightning_merge.recipes import Classifier, Digits
from lightning_merge.recipes._catalog import recipes
from lightning_merge.recipes.streams._run import matrix_of
from lightning_merge.recipes.streams._stream import Stream

STREAMS = [name for name in recipes() if name.startswith("continual/")]
QUICK = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=3", "--trainer.limit_test_batches=1"]
DIGITS = ["run", "continual/digits", *QUICK, "--stream.base_epochs=1"]


def run(folder: Path, *options: str) -> int:
    return main([*DIGITS, f"--trainer.default_root_dir={folder}", *options])


def record_of(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "stream.json").read_text())
    return record


def test_a_stream_ends_with_a_matrix_figures_and_a_bank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path) == 0
    record = record_of(tmp_path)
    assert [len(task["classes"]) for task in record["tasks"]] == [2, 2, 2]
    assert matrix_of(record, "accuracy").shape == (3, 3)
    assert not matrix_of(record, "accuracy_in_task").isnan().any()
    final = record["metrics"]["accuracy"]["final_average"]
    assert final == pytest.approx(sum(record["rows"][2]["accuracy"]) / 3, abs=1e-6)
    assert f"{final:.4f}" in capsys.readouterr().out
    assert [after["accuracy"]["backward_transfer"] is None for after in record["metrics_after_each"]] == [
        True,
        False,
        False,
    ]
    assert record["metrics_after_each"][2] == record["metrics"]
    assert (tmp_path / "matrix.png").stat().st_size > 5000
    assert (tmp_path / "curves.png").stat().st_size > 5000
    assert Bank(tmp_path / "bank").tasks == ["task0", "task1", "task2"]
    assert len(list((tmp_path / "checkpoints").rglob("task*-merged.ckpt"))) == 3
    # Run again: there is nothing left to do.
    before = (tmp_path / "stream.json").read_bytes()
    assert run(tmp_path) == 0
    assert (tmp_path / "stream.json").read_bytes() == before


def test_a_stream_whose_row_is_missing_measures_it_again(tmp_path: Path) -> None:
    run(tmp_path, "--merge.preset=average")
    whole = record_of(tmp_path)
    (tmp_path / "stream.json").write_text(json.dumps(whole | {"rows": whole["rows"][:-1]}))
    run(tmp_path, "--merge.preset=average")
    assert record_of(tmp_path) == whole


@pytest.mark.parametrize("step", ["training_step", "test_step"])
def test_sigterm_ends_with_its_own_code_and_says_how_to_go_on(
    step: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole")
    original, calls = getattr(Classifier, step), itertools.count()

    def terminated(*args: Any) -> Any:  # in the last batch of a test, or the second but last of training
        if next(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, step, terminated)
        assert run(tmp_path / "told") == 128 + signal.SIGTERM
    assert "stopped by SIGTERM. Run the same command again to go on" in capsys.readouterr().err
    assert not (tmp_path / "told" / "matrix.png").exists()
    assert run(tmp_path / "told") == 0
    assert record_of(tmp_path / "told") == record_of(tmp_path / "whole")


def test_another_stream_in_the_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    assert run(tmp_path, "--stream.order=1") == 2
    assert "holds another stream: its tasks are" in capsys.readouterr().err
    assert run(tmp_path, "--merge.preset=ema") == 2
    assert "MagMax" in capsys.readouterr().err


def test_unlearning_keeps_the_control_tasks_or_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, "--merge.preset=sum")
    bank = Bank(tmp_path / "bank")
    others = bank.combiner.combine([bank.vector("task0"), bank.vector("task2")])
    record = record_of(tmp_path)
    assert main(["unlearn", str(tmp_path), "--task=task1", "--keep=0.0001"]) == 0
    out = capsys.readouterr().out
    assert "task1" in out
    assert "control" in out
    left = Bank(tmp_path / "bank")
    assert left.tasks == ["task0", "task2"]
    result = left.result()
    assert result is not None
    assert all(torch.equal(result[name], others[name]) for name in others)
    unlearned = record_of(tmp_path)["unlearned"][0]
    assert unlearned["before"] == record["rows"][2]["accuracy"]
    assert "state_dict" in torch.load(tmp_path / "without-task1.ckpt", weights_only=True)
    assert main(["unlearn", str(tmp_path), "--task=task1"]) == 2
    assert "removed from the bank" in capsys.readouterr().err


def test_unlearning_goes_on_away_from_a_part_of_the_vector(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "--merge.preset=sum", "--merge.keep_vectors=true")
    bank, base = Bank(tmp_path / "bank"), StreamState(tmp_path / "bank").base()
    vectors = {task: bank.vector(task) for task in bank.tasks}
    for task, projection in (("task1", "ext-sub"), ("task0", "ethos")):
        vector = vectors.pop(task)
        others = bank.combiner.combine(list(vectors.values()))
        merged = add_vector({name: base[name] for name in vector}, others)
        part = ext_sub(vector, others) if projection == "ext-sub" else ethos(vector, merged)
        options = [f"--projection={projection}", "--scale=0.5", "--keep=0.0001"]
        assert main(["unlearn", str(tmp_path), f"--task={task}", *options]) == 0
        found = torch.load(tmp_path / f"without-{task}.ckpt", weights_only=True)["state_dict"]
        for name in vector:
            torch.testing.assert_close(found[name], merged[name] - 0.5 * part[name])
    assert [entry["projection"] for entry in record_of(tmp_path)["unlearned"]] == ["ext-sub", "ethos"]
    capsys.readouterr()
    assert main(["unlearn", str(tmp_path), "--task=task2", "--scale=0.5"]) == 2
    assert "`scale` must be above 0, and left out without a projection" in capsys.readouterr().err


def test_unlearning_that_costs_the_others_too_much_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path)
    rows = iter([{"accuracy": [1.0, 1.0, 1.0]}, {"accuracy": [0.9, 0.0, 0.9]}])
    monkeypatch.setattr("lightning_merge.recipes.streams._unlearn.accuracies", lambda *arguments: next(rows))
    assert main(["unlearn", str(tmp_path), "--task=task1"]) == 1
    assert "Nothing was changed" in capsys.readouterr().out
    assert len(Bank(tmp_path / "bank").tasks) == 3


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--merge.preset=magmin"], "`preset` must be a combiner or one of"),
        (["--stream.tasks=0"], "`stream.tasks` must be at least 1, got 0"),
        (["--stream.tasks=7"], "`tasks` must be in [1, 6]"),
        (["--stream.base_epochs=0"], "must both be 0 or neither"),
        (["--stream.scenario=domain"], "`stream.held_out` 0"),
    ],
)
def test_a_mistake_is_named(options: list[str], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, *options) == 2
    assert part in capsys.readouterr().err


def test_unlearn_names_a_folder_without_a_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["unlearn", str(tmp_path), "--task=a"]) == 2
    assert "holds no stream" in capsys.readouterr().err
    assert main(["unlearn", str(tmp_path), "--task=a", "--keep=2"]) == 2
    assert "`keep` must be in (0, 1], got 2.0" in capsys.readouterr().err


@pytest.mark.parametrize("scenario", ["class", "task", "domain"])
def test_scenarios_say_what_the_model_chooses_among(scenario: Any) -> None:
    tasks, base = Stream(classes=10, tasks=4, scenario=scenario, order=1).of(Digits())
    assert base is None
    if scenario == "domain":
        assert sorted(task.task for task in tasks) == ["turned0", "turned180", "turned270", "turned90"]
        assert all(task.classes is None for task in tasks)
    elif scenario == "task":
        assert all(task.choices == task.classes for task in tasks)
    else:
        assert [len(task.choices or ()) for task in tasks] == [2, 5, 7, 10]


def test_the_base_is_trained_on_classes_that_are_in_no_task() -> None:
    tasks, base = Stream(classes=10, tasks=3, held_out=4, base_epochs=1).of(Digits())
    assert base is not None
    assert base.classes is not None
    assert sorted([*base.classes, *(c for task in tasks for c in task.classes or ())]) == list(range(10))


@pytest.mark.parametrize("name", [name for name in STREAMS if "digits" not in name])
def test_every_stream_of_images_runs(name: str, tmp_path: Path) -> None:
    size = {"imagenet": 40}.get(name.partition("/")[2], 32)
    part = "val" if "imagenet" in name else "test"
    root = write_images(tmp_path / "images", size=size, **{"train": 4, part: 2})
    options = [f"--data.root={root}", "--data.batch_size=2", "--model.num_classes=3", "--trainer.accelerator=cpu"]
    stream = ["--stream.tasks=2", "--stream.held_out=1", "--stream.base_epochs=1"]
    if "imagenet" in name:
        options += ["--data.num_workers=0", "--data.image_size=32", "--model.model.model_name=test_resnet"]
    else:
        options += ["--data.val_images=3"]
    folder = [f"--trainer.default_root_dir={tmp_path / 'run'}"]
    assert main(["run", name, *QUICK, *options, *stream, *folder]) == 0
    assert len(record_of(tmp_path / "run")["rows"]) == 2


@pytest.mark.parametrize("name", [name for name in STREAMS if "digits-" in name])
def test_every_preset_with_a_recipe_runs_on_digits(name: str, tmp_path: Path) -> None:
    stream = ["--stream.tasks=2", "--stream.base_epochs=1", "--data.batch_size=8"]
    assert main(["run", name, *QUICK, *stream, f"--trainer.default_root_dir={tmp_path / 'run'}"]) == 0
    assert len(record_of(tmp_path / "run")["rows"]) == 2


def test_streams_are_found() -> None:
    presets = {f"digits-{preset}" for preset in ("emr", "fisher", "iso-c", "regmean")}
    assert {name.partition("/")[2] for name in STREAMS} == {"digits", "cifar10", "cifar100", "imagenet", *presets}
