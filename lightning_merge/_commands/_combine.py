"""``lightning-merge average`` and ``lightning-merge soup``: checkpoints merged into one, with its provenance."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_merge._commands import _combining as combining
from lightning_merge._commands._combine_arguments import SEARCHES, check
from lightning_merge._commands._needs import CLI_MODULES, need

if TYPE_CHECKING:  # the command line reads the arguments below without loading torch
    from lightning_merge.search import Found
    from lightning_merge.trajectory import Trajectory
    from lightning_merge.weights import Weights


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
    if options.rule == "model-stock":
        merged, coefficients = combining.model_stock(trajectory, options.base), None
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
        "base": None if options.rule != "model-stock" else os.fspath(options.base),
        "statistics": "measured" if bench is not None else "averaged",
    }
    if bench is not None:
        bench.load(merged)  # as the line that is printed does
    kept, lost = kept_of(paths)
    save({"state_dict": merged, **kept, "provenance": provenance}, options.out)
    return _report(options, trajectory, merged, provenance, lost)


def _bench(config: Path) -> Any:
    from lightning_merge._commands._runs import Bench

    return Bench(config)


def _which(options: argparse.Namespace, trajectory: "Trajectory") -> str:
    """Which of the sets of each file was taken, where there are several."""
    several = any(len(checkpoint.sets) > 1 for checkpoint in trajectory)
    return f"; of each file the {options.weights} weights (`--weights`)" if several else ""


def _report(
    options: argparse.Namespace,
    trajectory: "Trajectory",
    merged: "Weights",
    provenance: dict[str, Any],
    lost: list[str],
) -> str:
    from lightning_merge._commands._target import loading
    from lightning_merge.files._sets import tensors

    size = sum(tensor.numel() for tensor in tensors(merged).values())
    lines = [
        f"{options.out}: {options.rule} of {len(trajectory)} checkpoints, {size:,} numbers{_which(options, trajectory)}"
    ]
    if provenance["coefficients"] is not None:
        width = max(len(str(checkpoint.path)) for checkpoint in trajectory)
        for checkpoint, coefficient in zip(trajectory, provenance["coefficients"], strict=True):
            of_set = f"  {checkpoint.holds}" if len(checkpoint.sets) > 1 else ""
            lines.append(f"  {checkpoint.path!s:{width}}  {coefficient:8.4f}{of_set}")
    if provenance["score"] is not None:
        tied = f", {ties} others the same: the last is taken" if (ties := provenance["ties"]) else ""
        lines.append(
            f"  {options.monitor} = {provenance['score']:.6g} after {provenance['evaluations']} evaluations{tied}; the"
            " data it was chosen on flatter it, so test on other data"
        )
    lines += [f"  left out: {path}, {why}" for path, why in trajectory.left_out.items()]
    if trajectory.differing:
        lines.append(f"  counters that differ, those of the last file: {', '.join(trajectory.differing[:8])}")
    if lost:
        lines.append(
            f"  left out, since it differs or is no plain data: {', '.join(lost[:8])}; of hyperparameters, hand what is"
            " missing to `load_from_checkpoint`"
        )
    if options.config is None and any(name.endswith("running_mean") for name in merged):
        lines.append("  BatchNorm statistics are averaged, which fits badly; `--config FILE` measures them again")
    how = loading(options.out, 'torch.load({path}, weights_only=True)["state_dict"]')
    return "\n".join([*lines, f"  load: {how}"])
