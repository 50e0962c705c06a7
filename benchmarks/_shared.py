"""The parts that benchmarks share: arguments, timing, progress lines, and the file with results and versions.

Importing it loads no torch, so that the memory of a process that is measured stays its own.
"""

import argparse
import contextlib
import json
import math
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
"""Settings of a Trainer that prints and writes nothing."""

_START = time.perf_counter()


def parser(text: str | None, output: bool = True) -> argparse.ArgumentParser:
    """A parser with the benchmark's docstring as help, and ``--output`` for the file of results."""
    made = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    if output:
        made.add_argument("--output", type=Path, help="where to write the results as JSON, after each part")
    return made


def progress(text: str) -> None:
    """Prints a line to stderr at once, with the minutes since the start."""
    seconds = time.perf_counter() - _START
    print(f"[{int(seconds // 60)}:{seconds % 60:04.1f}] {text}", file=sys.stderr, flush=True)


def header(*packages: str, threads: bool = False) -> dict[str, Any]:
    """The top of a result file: the command, and the versions of torch, Python and other packages."""
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in ("torch", *packages)}
    versions: dict[str, Any] = {name: str(own or version(name)) for name, own in loaded.items()}
    versions["python"] = sys.version.split()[0]
    if threads:
        import torch

        versions |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    return {"command": " ".join(sys.argv), "versions": versions}


def write(result: Mapping[str, Any], output: Path | None) -> None:
    """Writes the results so far, in one step: a benchmark that is stopped leaves a whole file."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    part = output.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(output)


def seconds(work: Callable[[], Any], clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds of one call."""
    start = clock()
    work()
    return clock() - start


def clock_of(threads: int) -> Callable[[], float]:
    """Time on the wall, or of one thread the processor's, in which others on the machine do not count."""
    return time.process_time if threads == 1 else time.perf_counter


def alternating(contestants: Mapping[str, Callable[[], Any]], rounds: int = 15, warm: int = 2) -> dict[str, float]:
    """Milliseconds of each contestant: the median over rounds in which all take turns, the first ``warm`` left out."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, work in contestants.items():
            times[name].append(1e3 * seconds(work))
    return {name: statistics.median(values[warm:] or values) for name, values in times.items()}


def spread(values: list[float]) -> list[float]:
    """Median, lowest and highest."""
    return [round(f(values), 3) for f in (statistics.median, min, max)]


def interval(values: list[float]) -> dict[str, float | None]:
    """Mean and half the width of its 95 % interval (Student), which one value does not have."""
    from scipy.stats import t as student

    half = None
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    rounded = None if half is None else round(half, 5)
    return {"mean": round(statistics.fmean(values), 5), "half_width": rounded, "n": len(values)}


def revision() -> str:
    """The commit that is checked out, with ``-dirty`` if tracked files differ from it, other than results."""
    git = ["git", "-C", str(Path(__file__).parents[1])]
    changed = [*git, "diff", "HEAD", "--name-only", "--", ".", ":!benchmarks/results"]
    try:
        commit, dirty = (_printed(command) for command in ([*git, "rev-parse", "--short", "HEAD"], changed))
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit}-dirty" if dirty else commit


def _printed(command: list[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class OutOfTime(BaseException):
    """The time is over. Not an ``Exception``, so that nothing on the way takes it for an error."""


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raises ``OutOfTime`` inside after so many seconds."""

    def ring(*_: Any) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, ring)
    # Again after a while: what is raised where Python cannot pass it on, as in a destructor, is lost.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.1), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def child(script: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Any:
    """Runs a script in a process of its own; returns the JSON of its last line. Its stderr is shown as it comes."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def silence() -> None:
    """Hides warnings and Lightning's messages."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
