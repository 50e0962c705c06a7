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
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MODELS = ("resnet18", "resnet50", "vit_base_patch16_224")
TRAINED = {"resnet18": 8, "resnet50": 4, "vit_base_patch16_224": 2}  # batch sizes
ROUNDS = 15
DECAY = 0.999


def alternating(contestants: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Milliseconds of each, the median over rounds in which all take turns."""
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(ROUNDS):
        for name, work in contestants.items():
            start = time.perf_counter()
            work()
            times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def contestants(module: Any) -> dict[str, Callable[[], Any]]:
    """One update of an exponential mean by each library, on the same live module."""
    import torch
    from ema_pytorch import EMA as EmaPytorch
    from timm.utils import ModelEmaV3
    from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

    from lightning_merge import weights
    from lightning_merge.rules import ExponentialMean

    live = dict(weights.named_parameters(module))
    rule = ExponentialMean(DECAY)
    states = [rule.init(live) for _ in range(3)]
    flat = torch.randn(2, sum(t.numel() for t in live.values()))
    multi = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    lightning = AveragedModel(module, use_buffers=True, avg_fn=get_ema_avg_fn(DECAY))  # what its callback makes
    timm = ModelEmaV3(module, decay=DECAY)
    ema_pytorch = EmaPytorch(module, beta=DECAY, update_every=1)
    for peer in (multi, lightning):
        peer.update_parameters(module)  # the first call only copies

    def ours(averages: int, check: bool) -> None:
        if check:
            weights.nonfinite(live)
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
        "timm ModelEmaV3": lambda: timm.update(module),
        "ema-pytorch": lambda: ema_pytorch.update_moving_average(ema_pytorch.ema_model, module, DECAY),
        "Lightning EMAWeightAveraging": lambda: lightning.update_parameters(module),
    }


def updates(name: str) -> dict[str, float]:
    """Milliseconds of one update, the median over rounds in which all take turns."""
    import timm
    import torch

    torch.manual_seed(0)
    module = timm.create_model(name, pretrained=False)
    taking_turns = contestants(module)
    with torch.no_grad():
        return alternating(taking_turns)


def exchanges(name: str) -> dict[str, float]:
    """Microseconds per tensor to put merged weights in place and raw ones back, in a running fit."""
    import lightning.pytorch as pl
    import timm
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_merge.callbacks import EMA

    ema = EMA(DECAY)
    found: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model(name, pretrained=False, num_classes=10)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Probe(pl.Callback):
        def on_train_end(self, *args: Any) -> None:
            publisher = ema._publisher
            for _ in range(50):
                start = time.perf_counter()
                with publisher.swapped(ema):
                    pass
                found.append(1e6 * (time.perf_counter() - start) / len(ema.tensors))

    trainer = pl.Trainer(
        max_steps=2,
        accelerator="cpu",
        callbacks=[Probe(), ema],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(4, 3, 32, 32)), batch_size=2))
    return {"tensors": float(len(ema.tensors)), "us_per_tensor": statistics.median(found)}


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


def training_steps(name: str, batch_size: int, steps: int = 6, rounds: int = 2) -> dict[str, float]:
    """Milliseconds of a training step with and without ``EMA``, and of that the time inside its hooks."""
    from unittest.mock import patch

    import lightning.pytorch as pl
    import timm
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    from lightning_merge import weights
    from lightning_merge.callbacks import EMA
    from lightning_merge.callbacks._publication._session import Publisher
    from lightning_merge.rules import ExponentialMean

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model(name, pretrained=False, num_classes=10)

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3, momentum=0.9)

    hooks = Clock()
    work = Clock(within=hooks)

    class StepTimes(pl.Callback):
        """Milliseconds of each step: in all, inside hooks, and apart from the update."""

        def __init__(self) -> None:
            self.at: list[tuple[float, float, float]] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.at.append((time.perf_counter(), hooks.seconds, hooks.seconds - work.seconds))

        def steps(self) -> list[list[float]]:
            pairs = itertools.pairwise(self.at[1:])  # the first step warms up
            return [[1e3 * (b - a) for a, b in zip(start, end, strict=True)] for start, end in pairs]

    images = TensorDataset(torch.randn(steps * batch_size, 3, 224, 224), torch.randint(10, (steps * batch_size,)))

    def fit(callbacks: list[pl.Callback]) -> list[list[float]]:
        clock = StepTimes()
        trainer = pl.Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=[clock, *callbacks],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(Module(), DataLoader(images, batch_size=batch_size))
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
        patch.object(weights, "nonfinite", work.around(weights.nonfinite)),
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


def one_process() -> dict[str, Any]:
    """Everything, once."""
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    return {
        "updates_ms": {name: updates(name) for name in MODELS},
        "exchange": {name: exchanges(name) for name in ("resnet50", "resnet152")},
        "training_step_ms": {name: training_steps(name, batch_size) for name, batch_size in TRAINED.items()},
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, lowest and highest over processes."""

    def spread(values: list[float]) -> list[float]:
        return [round(f(values), 3) for f in (statistics.median, min, max)]

    ratios = {
        name: {
            contestant: spread([run["updates_ms"][name][contestant] / run["updates_ms"][name]["limit"] for run in runs])
            for contestant in runs[0]["updates_ms"][name]
        }
        for name in MODELS
    }
    checked = {
        name: spread(
            [
                run["updates_ms"][name]["ours, three averages and one check"]
                / (3 * run["updates_ms"][name]["ours, update and NaN check"])
                for run in runs
            ]
        )
        for name in MODELS
    }
    three = {
        name: spread(
            [
                run["updates_ms"][name]["ours, three averages"] / (3 * run["updates_ms"][name]["ours, update"])
                for run in runs
            ]
        )
        for name in MODELS
    }
    limit = {name: spread([run["updates_ms"][name]["limit"] for run in runs]) for name in MODELS}
    exchange = {name: spread([run["exchange"][name]["us_per_tensor"] for run in runs]) for name in runs[0]["exchange"]}
    steps = {}
    for name, batch_size in TRAINED.items():
        measured = [run["training_step_ms"][name] for run in runs]
        steps[name] = {
            "batch_size": batch_size,
            "EMA over plain": spread([step["EMA"] / step["plain"] for step in measured]),
            **{f"{key}, ms": spread([step[key] for step in measured]) for key in ("plain", "inside hooks")},
            "hooks apart from the update, ms": spread([step["apart from the update"] for step in measured]),
        }
    return {
        "limit_ms": limit,
        "update_over_limit": ratios,
        "three_over_three_passes": three,
        "three_and_one_check_over_three_checked_passes": checked,
        "exchange_us_per_tensor": exchange,
        "training_step_at_224_px": steps,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(one_process()))
        return
    runs = []
    for _ in range(arguments.processes):
        done = subprocess.run([sys.executable, __file__, "--child"], check=True, capture_output=True, text=True)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    import torch

    result = {
        "command": " ".join(sys.argv),
        "columns": "median, lowest, highest over processes",
        "versions": {"torch": torch.__version__, "python": sys.version.split()[0], "threads": torch.get_num_threads()},
        **summary(runs),
    }
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
