"""Compares the averages that only watch, exactly paired: all read the same trajectory of the same run.

    python benchmarks/quality.py digits --seeds 10 --output benchmarks/results/quality-digits.json
    python benchmarks/quality.py cifar10 --seeds 5 --root data/cifar10 --output benchmarks/results/quality-cifar10.json

A run trains at a constant learning rate, with EMA, SWA, LAWA and SWAD among its callbacks; the raw weights of the same
run are what they are compared with. Test accuracy is of the final weights, on images that nothing was chosen by.
"Steps to" is the first validation at which a set reaches the raw weights' final validation accuracy, over that of the
raw weights.
"""

import json
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from _shared import header, interval, parser, progress, write
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_merge.callbacks import EMA, LAWA, SWA, SWAD, WeightMerging
from lightning_merge.recipes import CIFAR, Classifier, Digits, SmallConvNet, SmallResNet


@dataclass(frozen=True)
class Setting:
    """One comparison."""

    epochs: int
    lr: float
    weight_decay: float
    images: str
    model: str
    precision: Literal["32-true", "bf16-mixed"]

    def data(self, root: str | None) -> pl.LightningDataModule:
        return Digits() if self.images == "digits" else CIFAR("cifar10", root=root, batch_size=64)

    def network(self) -> nn.Module:
        if self.model == "small conv net":
            return SmallConvNet()
        return SmallResNet(blocks=1, width=16).to(memory_format=torch.channels_last)


SETTINGS = {
    "digits": Setting(40, 0.05, 5e-4, "digits", "small conv net", "32-true"),
    # bfloat16 halves the time on a CPU that multiplies it; the weights and their averages stay float32.
    "cifar10": Setting(12, 0.02, 5e-4, "cifar10, 45,000", "ResNet-8, 16 wide", "bf16-mixed"),
}


def averages() -> list[WeightMerging]:
    return [
        SWAD("val/loss", stop=False, validate="both"),
        EMA(half_life="5%"),
        SWA(start_epoch=0.75),
        LAWA(k=6),
    ]


class History(pl.Callback):
    """The validation accuracies of raw weights and of each average that there is, over steps."""

    def __init__(self, merging: list[WeightMerging]) -> None:
        self.merging = merging
        self.rows: dict[int, dict[str, float]] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        metrics = trainer.callback_metrics
        # Until an average is ready, Lightning is told the raw weights' metric under its name.
        ready = {average.name: f"{average.name}/val/acc" for average in self.merging if average.ready}
        keys = {"raw": "val/acc", **ready}
        self.rows[trainer.global_step] = {name: metrics[key].item() for name, key in keys.items() if key in metrics}


def one_run(setting: Setting, root: str | None, seed: int) -> dict[str, Any]:
    """Final test accuracy of every set, and when each reached the raw weights' final validation accuracy."""
    torch.set_num_threads(1)  # two threads take other sums, so the run would depend on the machine
    pl.seed_everything(seed, verbose=False)

    def sgd(parameters: Any) -> Optimizer:
        return torch.optim.SGD(parameters, setting.lr, momentum=0.9, nesterov=True, weight_decay=setting.weight_decay)

    module = Classifier(setting.network(), num_classes=10, optimizer=sgd)
    data, merging = setting.data(root), averages()
    history = History(merging)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_epochs=setting.epochs,
            precision=setting.precision,
            callbacks=[*merging, history],
            default_root_dir=folder,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            **quiet,
        )
        start = time.perf_counter()
        trainer.fit(module, data)
        seconds = time.perf_counter() - start
    sets: dict[str, Mapping[str, Tensor]] = {average.name: average.merged_weights() or {} for average in merging}
    sets["raw"] = {**merging[1].raw_weights(), **merging[0].raw_weights()}
    tests: dict[str, float] = {}
    for name, tensors in sets.items():
        module.load_state_dict({**module.state_dict(), **tensors})
        tests[name] = pl.Trainer(precision=setting.precision, **quiet).test(module, data, verbose=False)[0]["test/acc"]
    goal = history.rows[max(history.rows)]["raw"]
    reached = {name: next((s for s, row in history.rows.items() if row.get(name, 0) >= goal), None) for name in sets}
    return {"seed": seed, "steps": max(history.rows), "seconds": round(seconds, 1), "test": tests, "reached": reached}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in runs[0]["test"] if name != "raw"]
    return {
        "test_accuracy": {name: interval([run["test"][name] for run in runs]) for name in runs[0]["test"]},
        "paired_difference_to_raw": {
            name: interval([run["test"][name] - run["test"]["raw"] for run in runs]) for name in names
        },
        "steps_to_raw_final_over_raw": {
            name: interval([run["reached"][name] / run["reached"]["raw"] for run in runs if run["reached"][name]])
            for name in names
            if sum(bool(run["reached"][name]) for run in runs)
        },
    }


def main() -> None:
    options = parser(__doc__)
    options.add_argument("setting", choices=list(SETTINGS))
    options.add_argument("--seeds", type=int, default=10)
    options.add_argument("--epochs", type=int, help="instead of the setting's")
    options.add_argument("--root", help="folder of CIFAR-10")
    arguments = options.parse_args()
    warnings.filterwarnings("ignore")
    setting = SETTINGS[arguments.setting]
    if arguments.epochs:
        setting = Setting(**{**setting.__dict__, "epochs": arguments.epochs})
    runs = []
    for seed in range(arguments.seeds):
        runs.append(one_run(setting, arguments.root, seed))
        progress(json.dumps(runs[-1]))
        result = {**header("lightning"), "setting": setting.__dict__, "runs": runs, **summary(runs)}
        write(result, arguments.output)
    print(json.dumps(summary(runs), indent=1))


if __name__ == "__main__":
    main()
