"""A configured run, shortened, from the start and again from a file, each in a new process."""

import json
import multiprocessing
import tempfile
from pathlib import Path
from typing import Any

import yaml

from lightning_merge._checks import whole
from lightning_merge._commands._runs import PARTS, quiet

_WITHOUT = ("RunReport", "SaveConfigCallback")
"""Callbacks that only print or write at the end."""


def replay_config(name: str, epochs: int, batches: int, epoch: int | None, batch: int | None) -> tuple[str, bool]:
    """What was found in words, and whether the resumed run is the uninterrupted one bit for bit.

    Args:
        name: A run folder, a configuration, or a bundled recipe.
        epochs: Of the run; at least 2.
        batches: Of an epoch, of training and of validation; at least 1.
        epoch: The epoch at whose end the file is written, counted from 0; ``None``: the middle one.
        batch: Of that epoch, if the file is to be written in the middle.

    Raises:
        ValueError: If an argument is out of range, ``name`` names nothing, or one of the two runs failed.
    """
    from lightning_merge.callbacks._replay import compared

    whole("--epochs", epochs, 2)
    whole("--batches", batches, 1)
    epoch = (epochs - 1) // 2 if epoch is None else whole("--epoch", epoch, 0, epochs - (2 if batch is None else 1))
    if batch is not None:
        whole("--batch", batch, 0, batches - 1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        config = _shortened(name, folder, epochs, batches)
        file = folder / "replay.ckpt"
        straight = _in_a_new_process(
            config, folder / "whole.json", {"save_as": file, "epoch": epoch, "batch": batch}, None
        )
        resumed = _in_a_new_process(config, folder / "resumed.json", {}, file)
        found = compared(straight, resumed)
    where = f"the end of epoch {epoch}" if batch is None else f"batch {batch} of epoch {epoch}"
    told = f"{name}: {epochs} epochs of {batches} batches, and again from {where} in a new process (counted from 0)."
    return f"{told}\n{found}", found.difference is None


def _shortened(name: str, folder: Path, epochs: int, batches: int) -> Path:
    from lightning_merge.recipes._catalog import whole as recipe

    given = Path(name)
    path = given / "config.yaml" if given.is_dir() else given
    if path.suffix in (".yaml", ".yml") and not path.is_file():
        raise ValueError(f"there is no file {path}: give a run folder with its config.yaml, or the name of a recipe.")
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8") if path.is_file() else recipe(name))
    except ValueError as error:
        raise ValueError(f"there is no run folder {name}, and {error}") from None
    content: dict[str, Any] = {key: value for key, value in read.items() if key in PARTS}
    trainer: dict[str, Any] = content.get("trainer") or {}
    kept = [each for each in trainer.get("callbacks") or [] if each["class_path"].rpartition(".")[2] not in _WITHOUT]
    short = {"max_epochs": epochs, "limit_train_batches": batches, "limit_val_batches": batches, "max_steps": -1}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    content["trainer"] = {**trainer, **short, **quiet, "callbacks": kept, "default_root_dir": str(folder / "run")}
    written = folder / "config.yaml"
    written.write_text(yaml.safe_dump(content), encoding="utf-8")
    return written


def _in_a_new_process(
    config: Path, log: Path, recorder: dict[str, Any], file: Path | None
) -> dict[str, dict[str, str]]:
    process = multiprocessing.get_context("spawn").Process(target=_record, args=(config, log, recorder, file))
    process.start()
    process.join()
    if process.exitcode:
        which = "the run" if file is None else "the run that went on from the file"
        raise ValueError(f"{which} failed; its error is above.")
    points: dict[str, dict[str, str]] = json.loads(log.read_text())
    return points


def _record(config: Path, log: Path, recorder: dict[str, Any], file: Path | None) -> None:
    """The new process."""
    from lightning_merge.callbacks._replay import record
    from lightning_merge.callbacks._replay_run._recorder import Recorder
    from lightning_merge.recipes._lightning_cli import instantiate

    with quiet():
        made = tuple(each for each in instantiate(config) if each is not None)
        points = record(made, Recorder(**recorder), file).points
    log.write_text(json.dumps(points))
