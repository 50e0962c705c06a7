"""``lightning-merge average`` and ``lightning-merge soup``: checkpoints merged into one, with its provenance."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_merge._commands import _combining as combining
from lightning_merge._commands._combine_arguments import FROM_BASE, SEARCHES, check
from lightning_merge._commands._needs import CLI_MODULES, need

if TYPE_CHECKING:  # the command line reads the arguments below without loading torch
    from lightning_merge.search import Found


def run(options: argparse.Namespace) -> int:
    """Runs ``average`` or ``soup`` and gives the exit code."""
    if options.config is not None:
        need(CLI_MODULES)
    print(combine(options))
    return 0


def combine(options: argparse.Namespace) -> str:
    """Merges, writes the file, and says what is in it.

    Raises:
        ValueError: If something does not fit; nothing is written then.
    """
    from lightning_merge._commands._combine_report import report
    from lightning_merge._commands._kept import kept_of
    from lightning_merge._commands._target import refuse_input, save
    from lightning_merge._mergeable import refuse_lora_factors
    from lightning_merge.trajectory import Trajectory

    check(options)
    if options.command == "average":
        trajectory = Trajectory.of_run(
            options.run, options.pattern, options.weights, options.start, options.end, options.last
        )
    else:
        trajectory = Trajectory.of_files(options.files, options.weights)
        refuse_lora_factors(trajectory[0].places, len(trajectory), lambda i, name: trajectory[i].tensor(name))
    paths = [checkpoint.path for checkpoint in trajectory]
    given = paths if options.command == "average" else options.files
    refuse_input(options.out, [*paths, *given, getattr(options, "base", None), options.config, options.log])
    hashes = [checkpoint.sha256() for checkpoint in trajectory]
    bench = None if options.config is None else _bench(options.config)
    found: Found | None = None
    if options.rule in FROM_BASE:
        merged, coefficients = combining.from_base(trajectory, options), None
    elif options.rule in SEARCHES:
        found = combining.search(trajectory, options, bench, hashes)
        coefficients = list(found.coefficients)
        merged = trajectory.combine(coefficients)
    else:
        coefficients = combining.coefficients(options, len(trajectory))
        merged = trajectory.combine(coefficients)
    if bench is not None:
        merged = combining.measured(bench, merged, options.seed)
    provenance = {
        "rule": options.rule,
        "weights": options.weights,
        "files": [os.fspath(path) for path in paths],
        "sets": [checkpoint.holds for checkpoint in trajectory],
        "sha256": hashes,
        "coefficients": coefficients,
        "score": None if found is None else found.score,
        "monitor": None if found is None else options.monitor,
        "evaluations": None if found is None else len(found.history),
        "ties": None if found is None else found.ties,
        "base": os.fspath(options.base) if options.rule in FROM_BASE else None,
        "statistics": "measured" if bench is not None else "averaged",
    }
    if bench is not None:
        bench.load(merged)  # as the line that is printed does
    kept, lost = kept_of(paths)
    save({"state_dict": merged, **kept, "provenance": provenance}, options.out)
    return report(options, trajectory, merged, provenance, lost)


def _bench(config: Path) -> Any:
    from lightning_merge._commands._runs import Bench

    return Bench(config)
