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
from torch import nn
from torch.nn.functional import mse_loss

from lightning_merge.search import (
    CMAES,
    MAP,
    Adam,
    Bayesian,
    Coefficients,
    CrossEntropy,
    Entropy,
    Evolutionary,
    Free,
    Greedy,
    Line,
    Measured,
    Method,
    Objective,
    search,
)
from lightning_merge.trajectory import Trajectory

FILES, BUDGET = 4, 7
METHODS: dict[str, Method] = {
    "greedy": Greedy(),
    "line": Line(),
    "evolutionary": Evolutionary(population=4),
    "bayesian": Bayesian(random_starts=2),
    "cma-es": CMAES(population=4),
    "map": MAP(samples=5, points=8),
    "adamerging": Adam(0.1),
    "atlas": Adam(0.1, start=0.0),
}
BY_GRADIENT = {"adamerging": Entropy, "atlas": CrossEntropy}
EVENTS = {"evaluation": BUDGET, "batch": 2 * BUDGET, "line": BUDGET + 1}


def run(name: str, folder: Path, on_event: Callable[[str], None] = lambda kind: None) -> None:
    """One search, from where its log is; writes ``end.pt``."""
    cut_lines(on_event)
    files, log = Trajectory.of_run(checkpoints(folder)), folder / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True) if log.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    known = {tuple(json.loads(line)["coefficients"]) for line in whole[1:]}
    network = Network()
    data = loaders()[1]

    def score(coefficients: Coefficients) -> Measured:
        if coefficients in known:
            raise RuntimeError(f"{coefficients} is in the log, and was scored again")
        on_event("evaluation")
        network.load_state_dict(files.combine(coefficients))
        network.eval()
        losses = []
        with torch.no_grad():
            for inputs, targets in data:
                on_event("batch")
                losses.append(float(mse_loss(network.net(inputs), targets)))
        # Pulled into the middle of the space, apart for each part: else the proposals of MAP are among its samples.
        parts = [loss + 10.0 * (a - 0.4) ** 2 for loss, a in zip(losses, coefficients, strict=False)]
        return Measured(sum(parts), parts=tuple(parts))

    given = {"mode": "min", "budget": BUDGET, "seed": 3, "log": log}
    if name in BY_GRADIENT:
        objective = Watched(name, on_event, len(whole) - 1)
        given |= {"per": "tensor", "tensors": objective.inner.tensors, "space": Free(-10.0, 10.0)}
        found = search(objective, 2, METHODS[name], **given)
    else:
        found = search(score, FILES, METHODS[name], **given)
    history = [(each.coefficients, each.score) for each in found.history]
    end = {"coefficients": found.coefficients, "history": history, "log": log.read_text()}
    torch.save(end, folder / "end.pt")


class Watched(Objective):
    """Two task vectors of a small network, by a gradient on batches that change."""

    def __init__(self, name: str, on_event: Callable[[str], None], known: int) -> None:
        generator = torch.Generator().manual_seed(0)
        module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 3))
        module.register_forward_hook(lambda *_: on_event("batch"))
        base = {name: torch.rand(like.shape, generator=generator) for name, like in module.named_parameters()}
        vectors = [
            {name: torch.randn(like.shape, generator=generator) for name, like in base.items()} for _ in range(2)
        ]
        inputs = torch.randn(2, 3, 16, 8, generator=generator)
        labels = torch.randint(3, (2, 3, 16), generator=generator)
        data = [list(zip(*task, strict=True)) for task in zip(inputs, labels, strict=True)]
        self.inner = BY_GRADIENT[name](module, base, vectors, data, per="tensor")
        self.on_event, self.known = on_event, known

    @property
    def subject(self) -> str:
        return self.inner.subject

    def measure(self, coefficients: Coefficients, number: int) -> Measured:
        if number < self.known:
            raise RuntimeError(f"evaluation {number} is in the log, and was scored again")
        self.on_event("evaluation")
        return self.inner.measure(coefficients, number)


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
