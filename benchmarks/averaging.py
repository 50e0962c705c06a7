"""Times one update and one exchange of weights, ours and others', as ratios to the memory-bandwidth limit.

    python benchmarks/averaging.py --processes 5 --output benchmarks/results/averaging.json

The limit is one flat in-place ``lerp_`` over as many float32 numbers as the model has: it reads the weights and the
average and writes the average. All contestants alternate in one process, so that a drift of the machine meets them
alike; each process gives the ratio of medians, and the figure is the median over processes, with lowest and highest.
Others average BatchNorm's buffers along, ours copies none here: buffers are 0.1 to 0.4 % of these models.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODELS = ("resnet18", "resnet50", "vit_base_patch16_224")
ROUNDS = 15
DECAY = 0.999


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
    times: dict[str, list[float]] = {contestant: [] for contestant in taking_turns}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for contestant, update in taking_turns.items():
                start = time.perf_counter()
                update()
                times[contestant].append(1e3 * (time.perf_counter() - start))
    return {contestant: statistics.median(values[2:]) for contestant, values in times.items()}


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
    return {
        "limit_ms": limit,
        "update_over_limit": ratios,
        "three_over_three_passes": three,
        "exchange_us_per_tensor": exchange,
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
