"""How far float32 means of many updates are from those in float64, on a small tensor: ``Mean`` and ``ExponentialMean``.

    python benchmarks/numerics.py --output benchmarks/results/numerics.json

Two streams of float32 weights around 1: noise (independent, standard deviation 1e-3), and a drift (the weights grow by
1e-7 per update, as far as float32 holds that). The error is the largest over the numbers of the tensor. It is given
relative to the mean, and as a share of the lag, the distance of the exact average from the last weights: less than the
lag is what an average is for.
"""

from collections.abc import Callable
from typing import Any

import torch
from _shared import header, parser, progress, write
from torch import Tensor

from lightning_merge.rules import ExponentialMean, Mean, Rule

NUMBERS = 256
EVERY = 5000
"""Updates between progress lines."""

RULES: dict[str, Rule] = {
    "Mean": Mean(),
    "ExponentialMean(0.999)": ExponentialMean(0.999),
    "ExponentialMean(0.9999)": ExponentialMean(0.9999),
    "ExponentialMean(0.9999, compensated=True)": ExponentialMean(0.9999, compensated=True),
}


def noise(generator: torch.Generator) -> Callable[[int], Tensor]:
    start = 1 + torch.rand(NUMBERS, generator=generator)
    return lambda i: start + 1e-3 * torch.randn(NUMBERS, generator=generator)


def drift(generator: torch.Generator) -> Callable[[int], Tensor]:
    start = 1 + torch.rand(NUMBERS, generator=generator, dtype=torch.float64)
    return lambda i: (start + 1e-7 * i).float()


def errors(stream: Callable[[int], Tensor], updates: int) -> dict[str, dict[str, float]]:
    """Of each rule, beside the same rule in float64 on the same float32 weights."""
    weights = stream(0)
    single = {name: rule.init({"w": weights}) for name, rule in RULES.items()}
    double = {name: rule.init({"w": weights.double()}) for name, rule in RULES.items()}
    for i in range(1, updates + 1):
        weights = stream(i)
        for name, rule in RULES.items():
            rule.update(single[name], {"w": weights})
            rule.update(double[name], {"w": weights.double()})
        if not i % EVERY:
            progress(f"update {i} of {updates}")
    found = {}
    for name, rule in RULES.items():
        ours, exact = ((rule.result(each[name]) or {})["w"].double() for each in (single, double))
        error, lag = (ours - exact).abs(), (exact - weights).abs()
        found[name] = {
            "relative_error": float((error / exact.abs()).max()),
            "median_relative_error": float((error / exact.abs()).median()),
            "error_over_lag": float((error.mean() / lag.mean()).clamp(max=1e9)),
        }
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--updates", type=int, default=100_000)
    options.add_argument("--seed", type=int, default=0)
    arguments = options.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, stream in (("noise", noise), ("drift", drift)):
        progress(name)
        found[name] = errors(stream(torch.Generator().manual_seed(arguments.seed)), arguments.updates)
        top = {**header(threads=True), "seed": arguments.seed, "updates": arguments.updates, "numbers": NUMBERS}
        write({**top, "errors": found}, arguments.output)
    for name, rows in found.items():
        for rule, row in rows.items():
            print(f"{name:6} {rule:42} {row}")


if __name__ == "__main__":
    main()
