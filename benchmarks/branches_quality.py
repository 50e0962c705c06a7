"""Compares Lookaround with what takes as many gradient steps on the same images, seed by seed.

    python benchmarks/branches_quality.py --seeds 5 --root data/cifar10 --output branches-cifar10.json

All runs of a seed start from the same weights and see the same batches in the same order, batch t in augmentation t mod
3 (none, AutoAugment, RandAugment, after the loader's shifts and mirroring), and take one gradient step per batch. Only
"lookaround, same batch" takes three steps on each batch, one per augmentation, and sees a third of the batches; its
gradient steps are as many. PAPA trains three branches, and DiLoCo one, whose outer step is every 50th. EMA, SWA and the
statistics measured again are read off the run of plain SGD. Test accuracy is of the final weights, on images that
nothing was chosen by.
"""

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import header, interval, parser, progress, write
from timm.optim import Lookahead
from torch import Tensor
from torchvision.transforms import v2

from lightning_merge.callbacks import EMA, PAPA, DiLoCo, Lookaround, Published, WeightMerging
from lightning_merge.recipes import CIFAR, Augmented, Classifier, SmallResNet
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection

LR, WEIGHT_DECAY, BATCH, BRANCHES, STEPS_AROUND = 0.05, 5e-4, 64, 3, 5
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "accelerator": "cpu",
    "precision": "bf16-mixed",
}


def augmentations() -> list[Callable[[Any], Any]]:
    automatic = v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)
    return [Augmented(), Augmented(automatic, "cifar10", 8), Augmented(v2.RandAugment(), "cifar10", 8)]


class Mixed(Classifier):
    """Batch t of the run in augmentation t mod 3."""

    mix: list[Callable[[Any], Any]] | None = None
    seen = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.mix is not None and self.trainer.training and torch.is_grad_enabled():
            batch = self.mix[self.seen % BRANCHES](batch)
            self.seen += 1
        return super().training_step(batch, batch_idx)


def fit(
    arguments: argparse.Namespace,
    data: CIFAR,
    seed: int,
    callbacks: list[Published],
    mixed: bool = True,
    share: int = 1,
    k: int = 0,
    rate_moves_every: int = 1,
) -> Classifier:
    """A run of as many gradient steps as all take; ``share`` of them on each batch."""
    torch.set_num_threads(1)  # two threads take other sums, so the run would depend on the machine
    pl.seed_everything(seed, verbose=False)

    def sgd(parameters: Any) -> Any:
        optimizer = torch.optim.SGD(parameters, LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
        return Lookahead(optimizer, alpha=0.5, k=k) if k else optimizer

    steps = arguments.steps // share

    def cosine(optimizer: Any) -> Any:
        moves = steps // rate_moves_every
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda move: 0.5 + 0.5 * math.cos(math.pi * move / moves))

    network = SmallResNet(blocks=1, width=16).to(memory_format=torch.channels_last)
    module = Mixed(network, num_classes=10, optimizer=sgd, lr_scheduler=cosine, lr_interval="step")
    module.mix = augmentations() if mixed else None
    pl.seed_everything(seed + 1000, verbose=False)
    trainer = pl.Trainer(max_steps=steps, max_epochs=-1, callbacks=callbacks, limit_val_batches=0, **QUIET)
    trainer.fit(module, data.train_dataloader(), data.val_dataloader())
    return module


@torch.no_grad()
def accuracy(module: Classifier, data: CIFAR, tensors: Mapping[str, Tensor]) -> float:
    module.load_state_dict({**module.state_dict(), **tensors})
    module.eval()
    right = 0
    with torch.autocast("cpu", torch.bfloat16):
        for images, labels in data.test_dataloader():
            right += int((module(images).argmax(1) == labels).sum())
    return right / len(data.test)


def one_seed(arguments: argparse.Namespace, data: CIFAR, seed: int) -> dict[str, Any]:
    """Test accuracies of all contestants."""
    start = time.perf_counter()
    found: dict[str, float] = {}
    again = Selection(buffers="recompute")
    ema = EMA(half_life="5%")
    swa = WeightMerging(Mean(), EveryNSteps(100, start=0.75), again, name="swa")
    last = WeightMerging(Mean(), EveryNSteps(arguments.steps), again, name="last")
    module = fit(arguments, data, seed, [ema, swa, last])
    raw = {**ema.raw_weights(), **swa.raw_weights()}
    found["sgd"] = accuracy(module, data, raw)
    for name, average in (("sgd, statistics again", last), ("ema", ema), ("swa", swa)):
        found[name] = accuracy(module, data, {**raw, **(average.merged_weights() or {})})
    module = fit(arguments, data, seed, [], k=STEPS_AROUND)
    found["lookahead"] = accuracy(module, data, {})
    for name, batches in (("lookaround", "turns"), ("lookaround, same batch", "same")):
        own = augmentations() if batches == "same" else None
        lookaround = Lookaround(BRANCHES, STEPS_AROUND, own, batches, schedulers="step")
        module = fit(arguments, data, seed, [lookaround], mixed=own is None, share=1 if own is None else BRANCHES)
        merged, raw = lookaround.merged_weights() or {}, lookaround.raw_weights()
        shared = {key: tensor for key, tensor in raw.items() if "running" in key}
        found[f"{name}, statistics again"] = accuracy(module, data, merged)
        found[f"{name}, shared statistics"] = accuracy(module, data, {**merged, **shared})
    papa = PAPA(BRANCHES, batches="turns", buffers="recompute")  # its rate moves once per group of branches
    module = fit(arguments, data, seed, [papa], rate_moves_every=BRANCHES)
    found["papa, statistics again"] = accuracy(module, data, papa.merged_weights() or {})
    diloco = DiLoCo(1, every_n_steps=50, buffers="recompute")
    module = fit(arguments, data, seed, [diloco])
    found["diloco of one branch, statistics again"] = accuracy(module, data, diloco.merged_weights() or {})
    return {"seed": seed, "seconds": round(time.perf_counter() - start, 1), "test": found}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--steps", type=int, default=3600, help="gradient steps of a run, of 64 images each")
    options.add_argument("--root", help="folder of CIFAR-10")
    arguments = options.parse_args()
    warnings.filterwarnings("ignore")
    data = CIFAR("cifar10", root=arguments.root, batch_size=BATCH)
    for stage in ("fit", "test"):
        data.setup(stage)
    runs: list[dict[str, Any]] = []
    for seed in range(arguments.seeds):
        runs.append(one_seed(arguments, data, seed))
        progress(json.dumps(runs[-1]))
        names = list(runs[0]["test"])
        result = {
            **header("lightning"),
            "setting": {
                "model": "ResNet-8, 16 wide", "images": "cifar10, 45,000", "steps": arguments.steps, "batch": BATCH,
                "lr": LR, "schedule": "cosine to 0", "momentum": "0.9, nesterov", "weight_decay": WEIGHT_DECAY,
                "branches": BRANCHES, "every_n_steps": STEPS_AROUND, "precision": "bf16-mixed",
            },
            "runs": runs,
            "test_accuracy": {name: interval([run["test"][name] for run in runs]) for name in names},
            "paired_difference_to_sgd": {
                name: interval([run["test"][name] - run["test"]["sgd"] for run in runs]) for name in names[1:]
            },
        }  # fmt: skip
        write(result, arguments.output)
    print(json.dumps({key: result[key] for key in ("test_accuracy", "paired_difference_to_sgd")}, indent=1))


if __name__ == "__main__":
    main()
