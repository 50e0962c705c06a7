"""``lightning-merge average`` and ``lightning-merge soup``: checkpoints merged into one, with its provenance."""

import argparse
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_merge._commands import _combining as combining
from lightning_merge._commands._combine_arguments import FROM_BASE, SEARCHES, check
from lightning_merge._commands._form_arguments import adapter_folders
from lightning_merge._commands._needs import CLI_MODULES, need
from lightning_merge._commands._task_arguments import FROM_A_BASE, OF_TASKS

if TYPE_CHECKING:  # the command line reads the arguments below without loading torch
    from lightning_merge._commands._continued import Earlier
    from lightning_merge.search import Found
    from lightning_merge.trajectory import Trajectory
    from lightning_merge.weights import Weights


def run(options: argparse.Namespace) -> int:
    """Runs ``average`` or ``soup`` and gives the exit code."""
    if options.config is not None:
        need(CLI_MODULES)
    from lightning_merge._commands._combine_folder import is_first

    said = combine(options)
    if is_first():
        print(said)
    return 0


def combine(options: argparse.Namespace) -> str:
    """Merges, writes the file, and says what is in it.

    Raises:
        ValueError: If something does not fit; nothing is written then.
    """
    from lightning_merge._commands._combine_report import report
    from lightning_merge._commands._kept import kept_of
    from lightning_merge._commands._target import folder_of, refuse_input, save

    folder = folder_of(options.out)
    if options.command == "soup" and options.rule != "lorahub" and (adapters := adapter_folders(options.files)):
        from lightning_merge._commands._peft_soup import peft_soup

        if folder is not None or options.rank is not None:  # into a file factors go as they are, if they may
            return peft_soup(adapters, options)
    check(options)
    earlier, trajectory = _inputs(options)
    paths = [checkpoint.path for checkpoint in trajectory]
    refuse_input(options.out, [*paths, *_given(options)])
    if folder is not None:
        from lightning_merge.trajectory._sharded_output import layout_of

        layout_of(trajectory)  # raises if there is none
    with ThreadPoolExecutor() as threads:
        hashes = list(threads.map(lambda checkpoint: checkpoint.sha256(), trajectory))
    bench = None if options.config is None else _bench(options.config)
    if bench is not None and getattr(options, "align", False):
        from lightning_merge._commands._aligned import aligned

        bench.set_up()
        trajectory = aligned(trajectory, bench.model)
    if getattr(options, "masks", None) is not None:
        from lightning_merge._commands._masked import masked

        trajectory = masked(trajectory, options.masks)
    done = _merge(options, trajectory, earlier, bench, hashes)
    merged, found = done.weights, done.found
    if done.coefficients is not None and folder is None and options.rule not in OF_TASKS:
        merged = trajectory.combine(done.coefficients)
    if bench is not None:
        merged = combining.measured(bench, merged, options.seed)
    provenance = {
        **_provenance(options, trajectory, hashes, done.coefficients, found),
        "shares": done.shares or None,
    }
    whole = provenance if earlier is None else earlier.grown(provenance)
    if folder is not None:
        from lightning_merge._commands._combine_folder import write_folder

        return report(
            options, trajectory, provenance, write_folder(trajectory, provenance, whole, folder, options.processes)
        )
    if bench is not None:
        bench.load(merged)  # as the line that is printed does
    kept, lost = kept_of(paths)
    save({"state_dict": merged, **kept, "provenance": whole}, options.out)
    return report(options, trajectory, provenance, lost, done.remarks)


@dataclass
class _Merge:
    """What a rule gave: weights, or coefficients of all files that give them."""

    coefficients: list[float] | None = None
    weights: "Weights" = field(default_factory=dict)
    found: "Found | None" = None
    remarks: Sequence[str] = ()
    shares: Mapping[str, list[float]] = field(default_factory=dict)


def _merge(
    options: argparse.Namespace, trajectory: "Trajectory", earlier: "Earlier | None", bench: Any, hashes: list[str]
) -> _Merge:
    if options.rule in FROM_BASE:
        from lightning_merge._commands._from_base import from_base

        weights, remarks = from_base(trajectory, options)
        return _Merge(weights=weights, remarks=remarks)
    if options.rule in SEARCHES:
        found = combining.search(trajectory, options, bench, hashes)
        return _Merge(list(found.coefficients), found=found)
    if options.rule in OF_TASKS:
        weights, found, shares, remarks = _of_tasks(trajectory, options, bench, hashes)
        return _Merge(list(found.coefficients) if options.per == "model" else None, weights, found, remarks, shares)
    if earlier is not None:
        return _Merge(earlier.weights(options, len(trajectory) - 1))
    return _Merge(combining.coefficients(options, len(trajectory)))


def _of_tasks(trajectory: "Trajectory", options: argparse.Namespace, bench: Any, hashes: list[str]) -> Any:
    """The merge, what was found, coefficients by tensor where there are several, and what there is to say of it."""
    from lightning_merge._commands._from_adapters import from_adapters
    from lightning_merge._commands._from_tasks import from_tasks

    search = from_adapters if options.rule == "lorahub" else from_tasks
    return search(trajectory, options, bench, hashes)


def _given(options: argparse.Namespace) -> list[Path | None]:
    """All files that are named, beside those of the run's folder."""
    one = [
        getattr(options, name, None) for name in ("run", "continue_from", "base", "base_statistics", "config", "log")
    ]
    several = [getattr(options, name, None) or () for name in ("files", "statistics", "data")]
    return [*one, *(each for files in several for each in files)]


def _inputs(options: argparse.Namespace) -> "tuple[Earlier | None, Trajectory]":
    """The checkpoints to merge, the first of which is the merge that goes on, if one does."""
    from lightning_merge._commands._continued import Earlier
    from lightning_merge._mergeable import refuse_lora_factors
    from lightning_merge.trajectory import Trajectory

    if options.command == "average":
        trajectory = Trajectory.of_run(
            options.run, options.pattern, options.weights, options.start, options.end, options.last
        )
        if options.continue_from is None:
            return None, trajectory
        earlier = Earlier(options)
        return earlier, earlier.with_new(trajectory)
    trajectory = Trajectory.of_files(options.files, options.weights)
    if options.rule != "lorahub":
        refuse_lora_factors(trajectory[0].places, len(trajectory), lambda i, name: trajectory[i].tensor(name))
    return None, trajectory


def _provenance(
    options: argparse.Namespace,
    trajectory: "Trajectory",
    hashes: list[str],
    coefficients: list[float] | None,
    found: "Found | None",
) -> dict[str, Any]:
    return {
        "rule": options.rule,
        "decay": options.decay if options.rule == "ema" else None,
        "weights": options.weights,
        "files": [os.fspath(checkpoint.path) for checkpoint in trajectory],
        "sets": [checkpoint.holds for checkpoint in trajectory],
        "sha256": hashes,
        "coefficients": coefficients,
        "score": None if found is None else found.score,
        "monitor": None if found is None else options.monitor,
        "evaluations": None if found is None else len(found.history),
        "ties": None if found is None else found.ties,
        "base": os.fspath(options.base) if options.rule in (*FROM_BASE, *FROM_A_BASE) else None,
        "importance": [os.fspath(file) for file in getattr(options, "statistics", None) or ()] or None,
        "statistics": "averaged" if options.config is None else "measured",
        "aligned": getattr(options, "align", False),
        "masks": getattr(options, "masks", None),
    }


def _bench(config: Path) -> Any:
    from lightning_merge._commands._runs import Bench

    return Bench(config)
