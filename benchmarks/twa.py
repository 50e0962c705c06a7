"""Times a step of TWA's second stage on ResNet-18, beside a plain step and the limit of its two matrix-vector products.

    python benchmarks/twa.py --output benchmarks/results/twa.json

The limit is two reads of ``n`` float32 copies of the weights: the time of one flat sum over that many numbers, twice.
All alternate in one process; medians. Peak memory is what the process took beyond the plain model, in copies of the
weights.
"""

import json
import resource
from typing import Any

import timm
import torch
from _shared import alternating, header, parser, progress, write
from torch import Tensor

from lightning_merge.optim import Subspace


class Steps:
    """ResNet-18 on random images: a plain step, and steps of coefficients in the span of snapshots."""

    def __init__(self, snapshots: int, batch: int) -> None:
        torch.manual_seed(0)
        self.module = timm.create_model("resnet18", num_classes=10)
        self.live = dict(self.module.named_parameters())
        self.numbers = sum(tensor.numel() for tensor in self.live.values())
        self.optimizer = torch.optim.SGD(self.module.parameters(), 1e-3, momentum=0.9)
        self.images, self.labels = torch.randn(batch, 3, 64, 64), torch.randint(10, (batch,))
        self.plain()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.subspace = Subspace(self.live, snapshots)
        for _ in range(snapshots):
            with torch.no_grad():
                for tensor in self.live.values():
                    tensor.add_(torch.randn_like(tensor), alpha=1e-3)
            self.subspace.collect(self.live)
        self.subspace.begin(self.live)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        self.peak_copies = peak * 1024 / (4 * self.numbers)
        self.flat = next(iter(self.subspace._rows.values())).new_zeros(snapshots * self.numbers)

    def gradient(self) -> None:
        self.module.zero_grad()
        torch.nn.functional.cross_entropy(self.module(self.images), self.labels).backward()

    def plain(self) -> None:
        self.gradient()
        self.optimizer.step()

    def ours(self) -> None:
        self.gradient()
        self.alone(1e-3)

    def alone(self, lr: float = 0.0) -> None:
        gradients: dict[str, Tensor | None] = {name: tensor.grad for name, tensor in self.live.items()}
        self.subspace.step(self.live, gradients, lr)

    def limit(self) -> Any:
        return self.flat.sum(), self.flat.sum()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--snapshots", type=int, default=50)
    options.add_argument("--batch", type=int, default=32)
    options.add_argument("--rounds", type=int, default=15)
    arguments = options.parse_args()
    progress(f"{arguments.snapshots} snapshots of ResNet-18")
    steps = Steps(arguments.snapshots, arguments.batch)
    contestants = {
        "plain step": steps.plain,
        "TWA step": steps.ours,
        "TWA without forward and backward": steps.alone,
        "limit": steps.limit,
    }
    progress(f"{arguments.rounds} rounds of a {', a '.join(contestants)}")
    median = {name: round(value, 3) for name, value in alternating(contestants, arguments.rounds).items()}
    bound = median["plain step"] + 1.3 * median["limit"]
    result = {
        **header(threads=True),
        "parameters": steps.numbers,
        "median_ms": median,
        "TWA_step_over_plain_and_1.3_limits": round(median["TWA step"] / bound, 3),
        "products_over_limit": round(median["TWA without forward and backward"] / median["limit"], 3),
        "peak_copies_of_the_weights": round(steps.peak_copies, 2),
    }
    print(json.dumps(result, indent=1))
    write(result, arguments.output)


if __name__ == "__main__":
    main()
