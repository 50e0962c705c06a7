"""Times one update, one exchange of weights and a training step, as ratios to the memory-bandwidth limit.

    python benchmarks/averaging.py --processes 5 --output benchmarks/results/averaging.json

The limit is one flat in-place ``lerp_`` over as many float32 numbers as the model has: it reads the weights and the
average and writes the average. All contestants alternate in one process, so that a drift of the machine meets them
alike; each process gives the ratio of medians, and the figure is the median over processes, with lowest and highest.
Others average BatchNorm's buffers along, ours copies none here: buffers are 0.1 to 0.4 % of these models. "One read" is
a flat dot product, the least that a look for NaN before the update can cost.

A training step is measured in a Trainer, plain and with ``EMA`` in turns: SGD with momentum, float32, random images.
"Inside hooks" is all time that the callback takes per step, "apart from the update" that less the update and the check.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import lightning.pytorch as pl
import timm
import torch
from _shared import QUIET, alternating, child, header, parser, progress, silence, spread, write
from torch.utils.data import DataLoader, TensorDataset

from lightning_merge import weights
from lightning_merge.callbacks import EMA
from lightning_merge.callbacks._publication._session import Publisher
from lightning_merge.rules import ExponentialMean

MODELS = ("resnet18", "resnet50", "vit_base_patch16_224")
EXCHANGED = ("resnet50", "resnet152")
TRAINED = {"resnet18": 8, "resnet50": 4, "vit_base_patch16_224": 2}  # batch sizes
DECAY = 0.999


class Module(pl.LightningModule):
    """A model of timm with ten classes."""

    def __init__(self, name: str, momentum: float = 0.0) -> None:
        super().__init__()
        self.net = timm.create_model(name, pretrained=False, num_classes=10)
        self.momentum = momentum

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=self.momentum)


def images(count: int, pixels: int, batch_size: int) -> DataLoader[Any]:
    data = TensorDataset(torch.randn(count, 3, pixels, pixels), torch.randint(10, (count,)))
    return DataLoader(data, batch_size=batch_size)


def contestants(module: Any) -> dict[str, Callable[[], Any]]:
    """One update of an exponential mean by each library, on the same live module."""
    from ema_pytorch import EMA as EmaPytorch
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

    live = weights.Fixed(weights.named_parameters(module))  # as a callback has them
    rule = ExponentialMean(DECAY)
    states = [rule.init(live) for _ in range(3)]
    flat = torch.randn(2, sum(t.numel() for t in live.values()))
    multi = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    lightning = AveragedModel(module, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))  # what its callback makes
    timm_ema = ModelEmaV3(module, decay=DECAY)
    ema_pytorch = EmaPytorch(module, beta=DECAY, update_every=1)
    for peer in (multi, lightning):
        peer.update_parameters(module)  # the first call only copies

    def ours(averages: int, check: bool) -> None:
        if check:
            weights.find_nonfinite(live)
        with weights.in_one_pass() if averages > 1 else nullcontext(), weights.joining():
            for state in states[:averages]:
                rule.update(state, live)

    return {
        "limit": lambda: flat[0].lerp_(flat[1], 1 - DECAY),
        "one read": lambda: flat[1].dot(flat[1]),
        "ours, update": lambda: ours(1, check=False),
        "ours, update and NaN check": lambda: ours(1, check=True),
        "ours, three averages and one check": lambda: ours(3, check=True),
        "ours, three averages": lambda: ours(3, check=False),
        "torch swa_utils, multi": lambda: multi.update_parameters(module),
        "timm ModelEmaV3": lambda: timm_ema.update(module),
        "ema-pytorch": lambda: ema_pytorch.update_moving_average(ema_pytorch.ema_model, module, DECAY),
        "Lightning EMAWeightAveraging": lambda: lightning.update_parameters(module),
    }


def updates(name: str) -> dict[str, float]:
    """Milliseconds of one update, the median over rounds in which all take turns."""
    torch.manual_seed(0)
    taking_turns = contestants(timm.create_model(name, pretrained=False))
    with torch.no_grad():
        return alternating(taking_turns)


class Swaps(pl.Callback):
    """Times 50 swaps of an average at the end of training, in microseconds per tensor."""

    def __init__(self, average: EMA) -> None:
        self.average = average
        self.found: list[float] = []

    def on_train_end(self, *args: Any) -> None:
        publisher = self.average._publisher
        assert publisher is not None
        for _ in range(50):
            start = time.perf_counter()
            with publisher.swapped(self.average):
                pass
            self.found.append(1e6 * (time.perf_counter() - start) / len(self.average.tensors))


def exchanges(name: str) -> dict[str, float]:
    """Microseconds per tensor to swap merged weights in and raw ones back, in a running fit."""
    ema = EMA(DECAY)
    swaps = Swaps(ema)
    pl.Trainer(max_steps=2, callbacks=[swaps, ema], **QUIET).fit(Module(name), images(4, 32, 2))
    return {"tensors": float(len(ema.tensors)), "us_per_tensor": statistics.median(swaps.found)}


class Clock:
    """Adds up the seconds spent in functions it wraps, nested ones once; only what happens within another clock's."""

    def __init__(self, within: "Clock | None" = None) -> None:
        self.within = within
        self.seconds = 0.0
        self.inside = False

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside or (self.within is not None and not self.within.inside):
                return function(*args, **kwargs)
            self.inside, start = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start
                self.inside = False

        return timed


class StepTimes(pl.Callback):
    """Milliseconds of each step: in all, inside hooks, and apart from the update."""

    def __init__(self, hooks: Clock, work: Clock) -> None:
        self.hooks, self.work = hooks, work
        self.at: list[tuple[float, float, float]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.at.append((time.perf_counter(), self.hooks.seconds, self.hooks.seconds - self.work.seconds))

    def steps(self) -> list[list[float]]:
        pairs = itertools.pairwise(self.at[1:])  # the first step warms up
        return [[1e3 * (b - a) for a, b in zip(start, end, strict=True)] for start, end in pairs]


def training_steps(name: str, batch_size: int, steps: int = 6, rounds: int = 2) -> dict[str, float]:
    """Milliseconds of a training step with and without ``EMA``, and of that the time inside its hooks."""
    hooks = Clock()
    work = Clock(within=hooks)
    data = images(steps * batch_size, 224, batch_size)

    def fit(callbacks: list[pl.Callback]) -> list[list[float]]:
        clock = StepTimes(hooks, work)
        pl.Trainer(max_epochs=1, callbacks=[clock, *callbacks], **QUIET).fit(Module(name, momentum=0.9), data)
        return clock.steps()

    class Timed(EMA):
        pass

    for hook in ("on_train_batch_start", "on_train_batch_end"):
        setattr(Timed, hook, hooks.around(getattr(EMA, hook)))
    plain: list[list[float]] = []
    averaged: list[list[float]] = []
    with (
        patch.object(Publisher, "_after_step", hooks.around(Publisher._after_step)),
        patch.object(ExponentialMean, "update", work.around(ExponentialMean.update)),
        patch.object(weights, "find_nonfinite", work.around(weights.find_nonfinite)),
    ):
        for _ in range(rounds):
            plain += fit([])
            averaged += fit([Timed(DECAY)])
    with_ema, inside, apart = (statistics.median(column) for column in zip(*averaged, strict=True))
    return {
        "plain": statistics.median(step for step, _, _ in plain),
        "EMA": with_ema,
        "inside hooks": inside,
        "apart from the update": apart,
    }


def one_process(models: list[str]) -> dict[str, Any]:
    """Measures everything once, on the models that are asked for."""
    silence()
    found: dict[str, dict[str, Any]] = {"updates_ms": {}, "exchange": {}, "training_step_ms": {}}
    for name in filter(models.__contains__, MODELS):
        progress(f"update of {name}")
        found["updates_ms"][name] = updates(name)
    for name in filter(models.__contains__, EXCHANGED):
        progress(f"swap of {name}")
        found["exchange"][name] = exchanges(name)
    for name in filter(models.__contains__, TRAINED):
        progress(f"training step of {name}")
        found["training_step_ms"][name] = training_steps(name, TRAINED[name])
    return found


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest over processes."""
    updated = {name: [run["updates_ms"][name] for run in runs] for name in runs[0]["updates_ms"]}

    def ratios(name: str, above: str, below: str, times: int = 1) -> list[float]:
        return spread([each[above] / (times * each[below]) for each in updated[name]])

    passes = {
        "three_over_three_passes": ("ours, three averages", "ours, update"),
        "three_and_one_check_over_three_checked_passes": (
            "ours, three averages and one check",
            "ours, update and NaN check",
        ),
    }
    return {
        "processes": len(runs),
        "limit_ms": {name: spread([each["limit"] for each in found]) for name, found in updated.items()},
        "update_over_limit": {
            name: {contestant: ratios(name, contestant, "limit") for contestant in found[0]}
            for name, found in updated.items()
        },
        **{key: {name: ratios(name, *names, times=3) for name in updated} for key, names in passes.items()},
        "exchange_us_per_tensor": {
            name: spread([run["exchange"][name]["us_per_tensor"] for run in runs]) for name in runs[0]["exchange"]
        },
        "training_step_at_224_px": {
            name: _step(TRAINED[name], [run["training_step_ms"][name] for run in runs])
            for name in runs[0]["training_step_ms"]
        },
    }


def _step(batch_size: int, measured: list[dict[str, float]]) -> dict[str, Any]:
    return {
        "batch_size": batch_size,
        "EMA over plain": spread([step["EMA"] / step["plain"] for step in measured]),
        **{f"{key}, ms": spread([step[key] for step in measured]) for key in ("plain", "inside hooks")},
        "hooks apart from the update, ms": spread([step["apart from the update"] for step in measured]),
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--processes", type=int, default=5)
    options.add_argument("--models", nargs="+", default=[*MODELS, *EXCHANGED], help="names of timm")
    options.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = options.parse_args()
    if arguments.child:
        print(json.dumps(one_process(arguments.models)))
        return
    runs, result = [], {}
    for number in range(arguments.processes):
        progress(f"process {number + 1} of {arguments.processes}")
        runs.append(child(__file__, "--child", "--models", *arguments.models))
        result = {
            **header("lightning", threads=True),
            "columns": "median, lowest, highest over processes",
            **summary(runs),
        }
        write(result, arguments.output)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
