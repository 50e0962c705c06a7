"""Times what branches in turn cost beside their training steps, as ratios to the memory-bandwidth limit.

    python benchmarks/branches.py --processes 5 --output benchmarks/results/branches.json

ResNet-18 in float32, three branches, SGD with momentum. The limit of an average is the time of a flat, in-place
``lerp_`` over as many numbers, which moves two reads and a write, times four thirds: three reads and a write. Compared
with it are "mean", which writes the mean to memory of its own, "mix", which writes it to all three branches, and a loop
that clones, adds, divides and copies as the authors' optimizer does. All alternate in one process; a figure is the
median over processes of the ratio of medians, with lowest and highest.
"""

import argparse
import json
import statistics
import time
from typing import Any

import lightning.pytorch as pl
import timm
import torch
from _shared import QUIET, alternating, child, header, parser, progress, silence, spread, write
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import weights
from lightning_merge.branches import InTurn, uniform
from lightning_merge.branches import _optimizer_states as optimizer_states
from lightning_merge.callbacks import Lookaround

BRANCHES, BATCH = 3, 32


def averaging(model: str) -> dict[str, float]:
    """Milliseconds of an average of three branches."""
    module = timm.create_model(model)
    branches = InTurn(module, [], BRANCHES)
    sets = [branches.weights(branch) for branch in branches.own]
    flat = torch.randn(2, sum(t.numel() for t in sets[0].values()))
    row = [1 / BRANCHES] * BRANCHES
    into = weights.copies(sets[0])

    def clone_and_add() -> None:
        for tensors in zip(*(each.values() for each in sets), strict=True):
            mean = tensors[0].clone()
            for tensor in tensors[1:]:
                mean.add_(tensor)
            mean.div_(BRANCHES)
            for tensor in tensors:
                tensor.copy_(mean)

    def mean() -> None:
        weights.weighted_mean(sets, row, into)

    return alternating(
        {
            "limit": lambda: flat[0].lerp_(flat[1], 0.1),
            "mean": mean,
            "mix": lambda: branches.mix(uniform(BRANCHES)),
            "look for NaN": branches.diverged,
            "clone and add": clone_and_add,
        }
    )


def exchanges(model: str) -> dict[str, float]:
    """Microseconds per tensor to put another branch in place: its weights and its optimizer state."""
    module = timm.create_model(model)
    optimizer = torch.optim.SGD(module.parameters(), 0.1, 0.9)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    branches = InTurn(module, [optimizer], 2)
    live, other, state = branches.live, branches.weights(1), optimizer_states.copied(optimizer.state)
    turn = iter(range(1, 10**6))
    found = alternating(
        {
            "weights": lambda: weights.exchange(live, other),
            "optimizer state": lambda: optimizer_states.exchanged(optimizer, state),
            "whole turn": lambda: branches.activate(next(turn) % 2),
        }
    )
    return {name: 1e3 * milliseconds / len(live) for name, milliseconds in found.items()}


class Module(pl.LightningModule):
    """A model of timm with ten classes."""

    def __init__(self, model: str) -> None:
        super().__init__()
        self.net = timm.create_model(model, num_classes=10)

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.01, 0.9)


class Clock(pl.Callback):
    """Times Lightning's training step within ours, and ours, in milliseconds."""

    def __init__(self) -> None:
        self.whole: list[float] = []
        self.inner: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loop = trainer.fit_loop.epoch_loop.automatic_optimization
        ours = loop.run
        closure = loop._make_closure

        def run(*args: Any) -> Any:
            start = time.perf_counter()
            self.inside = 0.0
            result = ours(*args)
            self.whole.append(1e3 * (time.perf_counter() - start))
            self.inner.append(1e3 * self.inside)
            return result

        def timed(*args: Any) -> Any:
            self.start = time.perf_counter()
            return closure(*args)

        loop.run, loop._make_closure = run, timed
        trainer.optimizers[0].register_step_post_hook(self.stop)

    def stop(self, *args: Any) -> None:
        self.inside += time.perf_counter() - self.start


def fit(model: str, callbacks: list[pl.Callback], batches: int) -> Clock:
    """One epoch with these callbacks, timed."""
    clock = Clock()
    trainer = pl.Trainer(max_epochs=1, callbacks=[*callbacks, clock], **QUIET)
    data = TensorDataset(torch.randn(BATCH * batches, 3, 32, 32), torch.randint(10, (BATCH * batches,)))
    trainer.fit(Module(model), DataLoader(data, BATCH))
    return clock


def steps(model: str) -> dict[str, float]:
    """Milliseconds per micro-step of a fit, and of it inside our hooks, without averages."""
    plain = fit(model, [], 12)
    ours = fit(model, [Lookaround(BRANCHES, 10**6)], 12)
    beside = [(whole - inner) / BRANCHES for whole, inner in zip(ours.whole, ours.inner, strict=True)]
    without = [whole - inner for whole, inner in zip(plain.whole, plain.inner, strict=True)]
    return {
        "plain step": statistics.median(plain.whole[2:]),
        "micro-step": statistics.median(ours.whole[2:]) / BRANCHES,
        "hooks": statistics.median(beside[2:]) - statistics.median(without[2:]),
    }


def one_process(model: str) -> dict[str, Any]:
    """Measures everything once."""
    silence()
    torch.manual_seed(0)
    found: dict[str, Any] = {}
    parts = {"averaging_ms": averaging, "exchange_us_per_tensor": exchanges, "step_ms": steps}
    for name, measure in parts.items():
        progress(name)
        found[name] = measure(model)
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest over processes."""

    def of(key: str) -> dict[str, list[float]]:
        return {name: spread([run[key][name] for run in runs]) for name in runs[0][key]}

    limits = [4 / 3 * run["averaging_ms"]["limit"] for run in runs]
    ratios = {
        name: spread([run["averaging_ms"][name] / limit for run, limit in zip(runs, limits, strict=True)])
        for name in runs[0]["averaging_ms"]
        if name != "limit"
    }
    return {
        "limit_ms": spread(limits),
        "average_over_limit": ratios,
        "exchange_us_per_tensor": of("exchange_us_per_tensor"),
        "step_ms": of("step_ms"),
        "micro_step_over_plain_step": spread([r["step_ms"]["micro-step"] / r["step_ms"]["plain step"] for r in runs]),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--processes", type=int, default=5)
    options.add_argument("--model", default="resnet18", help="a name of timm")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.child:
        print(json.dumps(one_process(arguments.model)))
        return
    runs, result = [], {}
    for number in range(arguments.processes):
        progress(f"process {number + 1} of {arguments.processes}")
        runs.append(child(__file__, "--child", "--model", arguments.model))
        result = {
            **header("lightning", threads=True),
            "columns": "median, lowest, highest over processes",
            "model": arguments.model,
            "branches": BRANCHES,
            **summary(runs),
        }
        write(result, arguments.output)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
