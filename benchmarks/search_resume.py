"""Kills a search for coefficients at random points, starts it again, and compares the end with the uninterrupted one.

    python benchmarks/search_resume.py --points 12 --seed 0 --output benchmarks/results/resume-search.json

Equal: the coefficients, every evaluation in its order, and the log, byte for byte. A candidate that is in the log when
the search starts again and is scored once more is an error. A point is an evaluation, a batch of it, or a line of the
log that is cut in half. Children are forked from this process, which has torch and Lightning imported.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import torch
from resume import Network, loaders, main
from torch.nn.functional import mse_loss

from lightning_merge.search import Bayesian, Coefficients, Evolutionary, Greedy, Line, Method, search
from lightning_merge.trajectory import Trajectory

METHODS: dict[str, Method] = {
    "greedy": Greedy(),
    "line": Line(),
    "evolutionary": Evolutionary(population=4),
    "bayesian": Bayesian(random_starts=2),
}
FILES, BUDGET = 4, 7
EVENTS = {"evaluation": BUDGET, "batch": 2 * BUDGET, "line": BUDGET + 1}


def run(name: str, folder: Path, on_event: Callable[[str], None] = lambda kind: None) -> None:
    """One search, from where its log is; writes ``end.pt``."""
    cut_lines(on_event)
    files, log = Trajectory.of_run(checkpoints(folder)), folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    known = {tuple(json.loads(line)["coefficients"]) for line in lines[1:] if line.endswith("\n")}
    network = Network()
    data = loaders()[1]

    def score(coefficients: Coefficients) -> float:
        if coefficients in known:
            raise RuntimeError(f"{coefficients} is in the log, and was scored again")
        on_event("evaluation")
        network.load_state_dict(files.combine(coefficients))
        network.eval()
        total = 0.0
        with torch.no_grad():
            for inputs, targets in data:
                on_event("batch")
                total += float(mse_loss(network.net(inputs), targets))
        return total

    found = search(score, FILES, METHODS[name], mode="min", budget=BUDGET, seed=3, log=log)
    history = [(each.coefficients, each.score) for each in found.history]
    end = {"coefficients": found.coefficients, "history": history, "log": log.read_text()}
    torch.save(end, folder / "end.pt")


def checkpoints(folder: Path) -> Path:
    """Files of four networks that were not trained; the same in every folder."""
    place = folder / "files"
    place.mkdir(exist_ok=True)
    for step in range(FILES):
        pl.seed_everything(step, verbose=False)
        torch.save({"state_dict": Network().state_dict(), "global_step": step}, place / f"{step}.ckpt")
    return place


def cut_lines(on_event: Callable[[str], None]) -> None:
    """Makes a line of the log an event while half of it is in the file."""
    fsync = os.fsync

    def halved(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        whole = path.read_bytes()
        before = whole.rfind(b"\n", 0, -1) + 1
        os.truncate(path, (before + len(whole)) // 2)
        on_event("line")
        path.write_bytes(whole)
        fsync(handle)

    os.fsync = halved


if __name__ == "__main__":
    sys.exit(main(__doc__, METHODS, run, EVENTS, "searches"))
