"""Which files of a folder are checkpoints of one run."""

import math
import re
from collections.abc import Iterable
from pathlib import Path

from lightning_merge.files._lazy import Checkpoint, WhichWeights

_VERSION = re.compile(r"(version|run|seed|fold|split|trial|job|replica)[-_]?\d+", re.IGNORECASE)
"""Folders of which each is a run: versions of a logger, seeds, folds, trials."""

_OF_A_RUN = ("config.yaml", "hparams.yaml", "metrics.csv", ".hydra", "events.out.tfevents.*")
"""What loggers and command lines put into the folder of a run."""


def run_files(
    folder: Path, pattern: str, weights: WhichWeights, start: int, end: int | None
) -> tuple[list[Checkpoint], dict[Path, str]]:
    """The checkpoints of the run in a folder by step, one per step, and why other files that match were left out.

    Raises:
        ValueError: If there is no such folder, no file is left, one cannot be read, or they are of several runs.
    """
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is a file: name the folder of its run."
            if folder.exists()
            else f"there is no checkpoint in {folder}, for there is no folder of that name: name the folder of a run."
        )
    paths = sorted(folder.glob(pattern), key=_order)
    found: dict[object, Checkpoint] = {}
    left_out: dict[Path, str] = {}
    taken: dict[Checkpoint, Path] = {}
    for file in paths:
        if (twin := _twin(file, paths, weights)) is not None:
            left_out[file] = f"the {'average' if weights == 'raw' else 'raw weights'} of {twin.name}, as NeMo writes it"
            continue
        checkpoint = Checkpoint(file, weights)
        if checkpoint.merged_from:
            left_out[file] = f"merged by lightning-merge out of {checkpoint.merged_from} files"
            continue
        if checkpoint.step is not None and not start <= checkpoint.step <= (math.inf if end is None else end):
            continue
        taken[checkpoint] = file
        same = found.setdefault(file if checkpoint.step is None else checkpoint.step, checkpoint)
        if same is not checkpoint:
            left_out[file] = f"of the same step as {same.path.name}"
            if file.parent != same.path.parent and _differ(same, checkpoint):
                raise ValueError(_two_runs(folder, [same.path, file], f": at step {same.step} they differ"))
    if not found:
        others = f" Left out: {_listed(left_out)}." if left_out else ""
        raise ValueError(
            f"no checkpoint in {folder} matches {pattern!r} at steps {start} to {end or 'the end'}.{others} Let"
            " ModelCheckpoint keep several: `every_n_train_steps=..., save_top_k=-1`."
        )
    if len(runs := list(dict.fromkeys(_run_of(file, folder) for file in taken.values()))) > 1:
        raise ValueError(_two_runs(folder, runs))
    ordered = sorted(found.values(), key=lambda each: -1 if each.step is None else each.step)
    return ordered, left_out


def _listed(left_out: dict[Path, str]) -> str:
    return "; ".join(f"{path.name} ({why})" for path, why in left_out.items())


def _order(file: Path) -> tuple[bool, list[tuple[int, str]]]:
    """A key by which ``step=9`` comes before ``step=10``, and what a run writes at its end last."""
    parts = re.split(r"(\d+)", file.name)
    return file.stem.endswith("-final"), [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def _twin(file: Path, paths: Iterable[Path], weights: WhichWeights) -> Path | None:
    """Of a pair that NeMo's EMA writes, ``x.ckpt`` and ``x-EMA.ckpt``, the one that is taken instead of this one."""
    is_average = file.stem.endswith("-EMA")
    twin = file.with_stem(file.stem.removesuffix("-EMA") if is_average else f"{file.stem}-EMA")
    return twin if is_average == (weights == "raw") and twin in paths else None


def _run_of(file: Path, folder: Path) -> Path:
    """The folder of the run that wrote a file, as Lightning, its loggers and command lines lay it out."""
    inside = file.relative_to(folder).parents
    for place in (folder / each for each in inside):
        if place == folder:
            break
        if place.name == "checkpoints":
            return place.parent
        if _VERSION.fullmatch(place.name) or any(next(place.glob(name), None) for name in _OF_A_RUN):
            return place
    return folder


def _differ(one: Checkpoint, other: Checkpoint) -> bool:
    return one.places.keys() != other.places.keys() or any(
        not one.tensor(name).equal(other.tensor(name)) for name in one.places
    )


def _two_runs(folder: Path, runs: list[Path], why: str = "") -> str:
    some = ", ".join(map(str, runs[:4])) + (" ..." if len(runs) > 4 else "")
    return (
        f"{folder} holds checkpoints of {max(2, len(runs))} runs ({some}){why}. An average is of one run: name its"
        " folder. Of runs from one start, or of one that went on in another folder, name the files:"
        " `lightning-merge soup FILE...`."
    )
