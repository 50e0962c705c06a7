"""Runs a protocol seed by seed into one file, from where the file stands."""

import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from _shared import header, interval, progress, revision, write
from rich.console import Console
from rich.progress import track
from scipy.stats import t as student

from _evidence._protocol import Place, Protocol

SAME = ("protocol", "size", "device", "setting", "versions")
"""What must be equal for seeds to stand in one file."""


def fill(name: str, protocol: Protocol, place: Place, output: Path, seeds: int, left: Callable[[], float]) -> bool:
    """Adds the seeds that are missing, each written when it is done.

    Args:
        name: Of the protocol.
        protocol: Prepared here if a seed is missing.
        place: Where it runs.
        output: The file of results, which may exist.
        seeds: How many there should be, counted from 0.
        left: Seconds that are left; no seed is begun that would take longer than the longest so far.

    Returns:
        Whether all seeds are there.

    Raises:
        FileExistsError: If the file is of another setting, device or version.
    """
    result = opened(name, protocol, place, output)
    missing = [seed for seed in range(seeds) if seed not in {run["seed"] for run in result["runs"]}]
    if not missing:
        progress(f"{name}: all {seeds} seeds are in {output}")
        return True
    protocol.prepare(place)
    if "chosen" not in result:
        progress(f"{name}: searching on validation data")
        result["chosen"] = protocol.choose()
        write(result, output)
    terminal = Console(stderr=True)
    for seed in track(missing, name, console=terminal, disable=not terminal.is_terminal, transient=True):
        longest = max((run["seconds"] for run in result["runs"]), default=0.0)
        if longest > left():
            progress(f"{name}: seed {seed} would take {longest:.0f} s, {left():.0f} s are left")
            return False
        result["runs"].append(one_run(protocol, seed, result["chosen"]))
        result["summary"] = summary(result["runs"], protocol.beside)
        write(result, output)
        progress(f"{name}: seed {seed}, {len(result['runs'])} of {seeds}, {result['runs'][-1]['seconds']:.0f} s")
    return True


def opened(name: str, protocol: Protocol, place: Place, output: Path) -> dict[str, Any]:
    """The results so far; runs of another setting are refused, a search without runs is begun anew."""
    setting = json.loads(json.dumps(protocol.setting()))  # as it comes back from the file
    top: dict[str, Any] = {
        **header("lightning", "timm"),
        "protocol": name,
        "claim": protocol.claim,
        "beside": protocol.beside,
        "by_budget": protocol.by_budget,
        "size": place.size,
        "device": torch.cuda.get_device_name() if place.device.startswith("cuda") else "cpu, 1 thread",
        "setting": setting,
        "runs": [],
    }
    if not output.exists():
        return top
    found: dict[str, Any] = json.loads(output.read_text())
    other = [key for key in SAME if found.get(key) != top[key]]
    if other and found["runs"]:
        key = other[0]
        raise FileExistsError(
            f"{output} has another {key}, {found.get(key)} and not {top[key]}: name another file with --output."
        )
    return top if other else found


def one_run(protocol: Protocol, seed: int, chosen: Mapping[str, Any]) -> dict[str, Any]:
    start, at = time.perf_counter(), revision()
    scores = protocol.run(seed, chosen)
    rounded = {view: {one: round(value, 5) for one, value in of_view.items()} for view, of_view in scores.items()}
    return {"seed": seed, "revision": at, "seconds": round(time.perf_counter() - start, 1), "scores": rounded}


def summary(runs: list[dict[str, Any]], beside: str) -> dict[str, Any]:
    """Mean of each contestant in each view, and its paired difference, with half the widths of 95 % intervals."""
    found: dict[str, Any] = {}
    for view, of_view in runs[0]["scores"].items():
        found[view] = {}
        for one in of_view:
            values, others = ([run["scores"][view][each] for run in runs] for each in (one, beside))
            found[view][one] = {"score": interval(values)}
            if one != beside:
                found[view][one]["difference"] = interval([a - b for a, b in zip(values, others, strict=True)])
    return found


def check(protocol: Protocol, place: Place, output: Path) -> int:
    """Runs one fresh seed beside the file's; returns how many figures are outside their 95 % prediction interval."""
    result = json.loads(output.read_text())
    seed = 1 + max(run["seed"] for run in result["runs"])
    protocol.prepare(place)
    fresh, outside, count = one_run(protocol, seed, result["chosen"])["scores"], 0, 0
    for view, of_view in fresh.items():
        for one, value in of_view.items():
            low, high = predicted([run["scores"][view][one] for run in result["runs"]])
            count += 1
            if not low <= value <= high:
                outside += 1
                print(f"{view}, {one}: {value:.2f} is not in {low:.2f} to {high:.2f}")
    print(f"seed {seed}: {count - outside} of {count} figures lie in the 95 % prediction intervals of {output.name}")
    return outside


def predicted(values: list[float]) -> tuple[float, float]:
    """Where 95 % of further values lie: ``mean ± t * sd * sqrt(1 + 1 / n)``."""
    n = len(values)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) * math.sqrt(1 + 1 / n)
    return statistics.fmean(values) - half, statistics.fmean(values) + half


def read(output: Path) -> dict[str, Any] | None:
    """A file with runs; ``None`` if there is none yet."""
    if not output.exists():
        return None
    result: dict[str, Any] = json.loads(output.read_text())
    return result if result["runs"] else None
