"""Runs a whole stream of tasks, measures the matrix of accuracies, and resumes after a kill."""

import json
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lightning_merge.callbacks import ContinualMerging, RandomState
from lightning_merge.continual import continual_metrics
from lightning_merge.files import atomic
from lightning_merge.recipes.streams._tasks import TaskData

MakeTrainer = Callable[[list[Callback]], Trainer]

_KINDS = {"accuracy": "test/acc", "accuracy_in_task": "test/acc_in_task"}
"""Name in the record -> metric: among the classes seen so far, and told the task. One stream gives both."""


def run_stream(
    module: LightningModule,
    tasks: Sequence[TaskData],
    merging: ContinualMerging,
    folder: Path,
    make_trainer: MakeTrainer,
    *,
    seed: int = 0,
    callbacks: Callable[[int], list[Callback]] = lambda task: [],
    log: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Fits each task in turn and tests the merged model on all of them after each; returns the record.

    Everything is in ``folder``: the record in ``stream.json``, a checkpoint of the task in progress, the bank where
    ``merging`` has it. A stream that was killed resumes there and ends bit for bit alike, given data whose order
    comes from torch's random numbers.

    Args:
        module: Holds the base, also when a stream resumes. Tests must log ``test/acc``, a share in [0, 1].
        tasks: In order.
        merging: Decides how; in the callback list of every fit.
        folder: Of the stream.
        make_trainer: Makes a Trainer with these callbacks; the first call with none is for tests.
        seed: Task ``i`` starts from the random state of ``seed + i``.
        callbacks: Further ones for a task, by its index; they come before ``merging``.
        log: Receives a line per task.

    Raises:
        ValueError: If the folder holds another stream.
    """
    record = _open(folder, tasks, merging, seed)
    tester = make_trainer([])
    if not record["baseline"]:
        record["baseline"] = accuracies(tester, module, tasks, -1)
        _write(folder, record)
    for index, task in enumerate(tasks):
        if index < merging.completed:
            if index >= len(record["rows"]):  # killed between the task and its row, which only the last one can be
                merging.load_merged(module)
        else:
            seed_everything(seed + index, verbose=False)
            place = folder / "checkpoints" / f"task{index}"
            latest = ModelCheckpoint(place, filename="{epoch}", save_top_k=1)
            fit = make_trainer([*callbacks(index), merging, RandomState(), latest])
            fit.fit(module, datamodule=task, ckpt_path=newest_checkpoint(place))
            _stop_if_told(fit)
        if index >= len(record["rows"]):
            record["rows"].append(accuracies(tester, module, tasks, index))
            record["metrics"] = {kind: metrics_of(record, kind) for kind in _KINDS if kind in record["rows"][0]}
            record["metrics_after_each"] = [*record["metrics_after_each"][:index], record["metrics"]]
            _write(folder, record)
            log(_line(record, index))
    return record


def newest_checkpoint(folder: Path) -> Path | None:
    """Path of the last complete checkpoint of an epoch."""
    files = [path for path in folder.glob("epoch=*.ckpt") if zipfile.is_zipfile(path)]
    return max(files, key=lambda path: int(path.stem.partition("=")[2].partition("-")[0]), default=None)


def matrix_of(record: dict[str, Any], kind: str) -> Tensor:
    """The accuracies of a record as a matrix, NaN for tasks that were not trained yet."""
    size = len(record["tasks"])
    matrix = torch.full((size, size), math.nan, dtype=torch.float64)
    for index, row in enumerate(record["rows"]):
        matrix[index] = torch.tensor(row[kind], dtype=torch.float64)
    return matrix


def metrics_of(record: dict[str, Any], kind: str) -> dict[str, float | None]:
    """Every figure of a record's matrix; ``None`` where it is not defined."""
    baseline = torch.tensor(record["baseline"][kind], dtype=torch.float64)
    found = continual_metrics(baseline)(matrix_of(record, kind))
    return {name: None if math.isnan(value) else round(value.item(), 6) for name, value in found.items()}


def accuracies(
    tester: Trainer, module: LightningModule, tasks: Sequence[TaskData], after: int
) -> dict[str, list[float]]:
    """Accuracies on every task after task ``after``, those to come included, by kind."""
    row: dict[str, list[float]] = {}
    by_class = tasks[-1].choices != tasks[-1].classes  # class-incremental: among all that was seen
    for index, task in enumerate(tasks):
        own = task.choices
        if by_class:
            task.choices = tasks[max(after, index)].choices
        found = tester.test(module, datamodule=task, verbose=False)[0]
        _stop_if_told(tester)
        task.choices = own
        for kind, metric in _KINDS.items():
            if metric in found:
                row.setdefault(kind, []).append(found[metric])
    if "accuracy" not in row:
        raise ValueError("a test must log `test/acc`, the share of samples that the module gets right.")
    return row


def _stop_if_told(trainer: Trainer) -> None:
    """Stops after a SIGTERM in the last batch of a fit or a test, which Lightning forgets."""
    if trainer.received_sigterm:
        raise SIGTERMException


def _open(folder: Path, tasks: Sequence[TaskData], merging: ContinualMerging, seed: int) -> dict[str, Any]:
    stream = {
        "tasks": [{"task": task.task, "classes": task.classes and list(task.classes)} for task in tasks],
        "merging": merging.describe(),
        "seed": seed,
    }
    path = folder / "stream.json"
    if not path.is_file():
        return {"format": 1, **stream, "baseline": {}, "rows": [], "metrics": {}, "metrics_after_each": []}
    record: dict[str, Any] = json.loads(path.read_text())
    for key, value in stream.items():
        if record.get(key) != value:
            raise ValueError(
                f"{folder} holds another stream: its {key} are {record.get(key)}, not {value}. Go on with the same"
                " settings, or choose another folder."
            )
    return record


def _write(folder: Path, record: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic(folder / "stream.json") as file:
        file.write(f"{json.dumps(record, indent=1)}\n".encode())


def _line(record: dict[str, Any], index: int) -> str:
    accuracies = record["rows"][index]["accuracy"][: index + 1]
    mean = sum(accuracies) / len(accuracies)
    each = ", ".join(f"{value:.1%}" for value in accuracies)
    name, of = record["tasks"][index]["task"], f"{index + 1} of {len(record['tasks'])}"
    return f"{name} ({of}): {mean:.1%} on the tasks so far: {each}"
