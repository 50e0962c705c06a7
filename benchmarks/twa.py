"""Times a step of TWA's second stage on ResNet-18, beside a plain step and the limit of its two matrix-vector products.

    python benchmarks/twa.py --output benchmarks/results/twa.json

The limit is two reads of ``n`` float32 copies of the weights: the time of one flat sum over that many numbers, twice.
All alternate in one process; medians. Peak memory is what the process took beyond the plain model, in copies of the
weights.
"""

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch

from lightning_merge.optim import Subspace


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--snapshots", type=int, default=50)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    module = timm.create_model("resnet18", num_classes=10)
    live = dict(module.named_parameters())
    numbers = sum(tensor.numel() for tensor in live.values())
    optimizer = torch.optim.SGD(module.parameters(), 1e-3, momentum=0.9)
    images, labels = torch.randn(arguments.batch, 3, 64, 64), torch.randint(10, (arguments.batch,))

    def gradient() -> None:
        module.zero_grad()
        torch.nn.functional.cross_entropy(module(images), labels).backward()

    def plain() -> None:
        gradient()
        optimizer.step()

    plain()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    subspace = Subspace(live, arguments.snapshots)
    for _ in range(arguments.snapshots):
        with torch.no_grad():
            for tensor in live.values():
                tensor.add_(torch.randn_like(tensor), alpha=1e-3)
        subspace.collect(live)
    subspace.begin(live)
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (4 * numbers)
    flat = next(iter(subspace._rows.values())).new_zeros(arguments.snapshots * numbers)

    def ours() -> None:
        gradient()
        subspace.step(live, {name: tensor.grad for name, tensor in live.items()}, 1e-3)

    def alone() -> None:
        subspace.step(live, {name: tensor.grad for name, tensor in live.items()}, 0.0)

    contestants: dict[str, Callable[[], Any]] = {
        "plain step": plain,
        "TWA step": ours,
        "TWA without forward and backward": alone,
        "limit": lambda: (flat.sum(), flat.sum()),
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(arguments.rounds):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
    median = {name: round(statistics.median(values[2:]), 3) for name, values in times.items()}
    bound = median["plain step"] + 1.3 * median["limit"]
    result = {
        "command": " ".join(sys.argv),
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0], "threads": torch.get_num_threads()},
        "parameters": numbers,
        "median_ms": median,
        "TWA_step_over_plain_and_1.3_limits": round(median["TWA step"] / bound, 3),
        "products_over_limit": round(median["TWA without forward and backward"] / median["limit"], 3),
        "peak_copies_of_the_weights": round(peak, 2),
    }
    print(json.dumps(result, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
