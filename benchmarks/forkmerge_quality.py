"""Compares ForkMerge with training on fixed task weights, with a task that may help and one that cannot, seed by seed.

    python benchmarks/forkmerge_quality.py --seeds 5 --root data/cifar10 --output forkmerge-cifar10.json

The target is the class of an image. Rotation prediction may help it, labels of other images cannot. All runs of a seed
start from the same weights, see the same batches in the same order, and take as many gradient steps: those of ForkMerge
are divided among its branches, which take turns at the batches. A step on two tasks runs the network twice, and each
merge measures 12 to 14 mixtures, by their loss on 2,000 images that no other contestant looks at; both come on top.
Test accuracy is of the final weights, with BatchNorm statistics measured again on training images for all. Few images
are trained on, so that there is something a further task can give.
"""

import argparse
import json
import math
import statistics
import time
import warnings
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import header, interval, parser, progress, write
from branches_quality import BATCH, LR, QUIET, WEIGHT_DECAY, accuracy
from torch import Tensor
from torch.nn.functional import cross_entropy

from lightning_merge.callbacks import ForkMerge, Published, WeightMerging
from lightning_merge.recipes import CIFAR, AuxiliaryClassifier, SmallResNet
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection

Tasks = dict[str, float]

TARGET: Tasks = {"target": 1.0}
HELPFUL: Tasks = {"target": 1.0, "rotation": 1.0}
HARMFUL: Tasks = {"target": 1.0, "noise": 1.0}
VALIDATION = 2000

FIXED: dict[str, Tasks] = {
    "target only": TARGET,
    "joint, helpful": HELPFUL,
    "joint, harmful": HARMFUL,
    "joint, both": HELPFUL | HARMFUL,
}
FORKS: dict[str, dict[str, Tasks]] = {
    "forkmerge, helpful": {"target": TARGET, "helpful": HELPFUL},
    "forkmerge, harmful": {"target": TARGET, "harmful": HARMFUL},
    "forkmerge, both": {"target": TARGET, "helpful": HELPFUL, "harmful": HARMFUL},
}


class Weighted(AuxiliaryClassifier):
    """Trains on fixed task weights, or leaves them to ``ForkMerge``."""

    tasks: Tasks | None = None

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        output = super().training_step(batch, batch_idx)
        if self.tasks is None:
            return output
        # In eval mode BatchNorm statistics are being measured, which are those of the target.
        tasks = self.tasks if self.training else TARGET
        return sum(weight * output["losses"][task]() for task, weight in tasks.items())

    def score_step(self, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
        # A loss tells mixtures apart that classify the same images alike.
        return -cross_entropy(self(batch[0]).float(), batch[1], reduction="sum"), len(batch[1])

    def _noisy(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.random.fork_rng(devices=[]):  # the order of batches must not depend on what a task draws
            torch.manual_seed(self.global_step)
            return super()._noisy(images, labels)


def fit(
    arguments: argparse.Namespace, data: CIFAR, seed: int, average: Published, tasks: Tasks | None, branches: int
) -> Weighted:
    """A run of as many gradient steps as all take, which leaves what the average publishes in the module."""
    torch.set_num_threads(1)  # two threads take other sums, so the run would depend on the machine
    pl.seed_everything(seed, verbose=False)

    def sgd(parameters: Any) -> Any:
        return torch.optim.SGD(parameters, LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)

    def cosine(optimizer: Any) -> Any:
        moves = arguments.steps // branches  # once per group of branches
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda move: 0.5 + 0.5 * math.cos(math.pi * move / moves))

    network = SmallResNet(blocks=1, width=16).to(memory_format=torch.channels_last)
    module = Weighted(network, num_classes=10, optimizer=sgd, lr_scheduler=cosine, lr_interval="step")
    module.tasks = tasks
    module.merge_dataloader = data.val_dataloader  # type: ignore[assignment]  # on which mixtures are measured
    pl.seed_everything(seed + 1000, verbose=False)
    trainer = pl.Trainer(max_steps=arguments.steps, max_epochs=-1, callbacks=[average], limit_val_batches=0, **QUIET)
    trainer.fit(module, data.train_dataloader())
    return module


def one_seed(arguments: argparse.Namespace, data: CIFAR, seed: int) -> dict[str, Any]:
    """Test accuracies of all contestants, seconds of each, and the mean shares of ForkMerge's branches."""
    found: dict[str, float] = {}
    seconds: dict[str, float] = {}
    shares: dict[str, dict[str, float]] = {}
    for name in (*FIXED, *FORKS):
        start = time.perf_counter()
        if name in FIXED:
            last = WeightMerging(Mean(), EveryNSteps(arguments.steps), Selection(buffers="recompute"), name="last")
            module = fit(arguments, data, seed, last, FIXED[name], branches=1)
        else:
            branches = FORKS[name]
            every = arguments.steps // len(branches) // arguments.merges
            fork = ForkMerge(branches, every, heads=["rotation.*", "noise.*"], batches="turns")
            module = fit(arguments, data, seed, fork, None, len(branches))
            rows = [row["shares"] for row in fork.history]
            assert len(rows) == arguments.merges
            shares[name] = {branch: round(statistics.fmean(row[branch] for row in rows), 4) for branch in branches}
            shares[name]["last merge kept"] = round(statistics.fmean(row["previous"] for row in fork.history), 4)
        found[name] = accuracy(module, data, {})
        seconds[name] = round(time.perf_counter() - start, 1)
    return {"seed": seed, "seconds": seconds, "test": found, "mean_shares": shares}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=5)
    options.add_argument("--steps", type=int, default=3600, help="gradient steps of a run, of 64 images each")
    options.add_argument("--merges", type=int, default=6, help="of a run of ForkMerge")
    options.add_argument("--images", type=int, default=4500, help="to train on")
    options.add_argument("--root", help="folder of CIFAR-10")
    arguments = options.parse_args()
    if arguments.steps % (6 * arguments.merges):
        options.error(f"--steps must be a multiple of {6 * arguments.merges}, so that every run ends with a merge.")
    warnings.filterwarnings("ignore")
    data = CIFAR("cifar10", root=arguments.root, batch_size=BATCH, train_images=arguments.images, val_images=VALIDATION)
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
                "model": "ResNet-8, 16 wide", "images": f"cifar10, {arguments.images}", "steps": arguments.steps,
                "batch": BATCH, "merges": arguments.merges, "validation": VALIDATION, "lr": LR,
                "schedule": "cosine to 0", "momentum": "0.9, nesterov", "weight_decay": WEIGHT_DECAY,
                "precision": "bf16-mixed",
            },
            "runs": runs,
            "test_accuracy": {name: interval([run["test"][name] for run in runs]) for name in names},
            "paired_difference_to_target_only": {
                name: interval([run["test"][name] - run["test"]["target only"] for run in runs]) for name in names[1:]
            },
            "paired_difference_to_joint_training": {
                name: interval([run["test"][name] - run["test"][name.replace("forkmerge", "joint")] for run in runs])
                for name in FORKS
            },
        }  # fmt: skip
        write(result, arguments.output)
    print(json.dumps({key: result[key] for key in result if key.startswith(("test", "paired"))}, indent=1))


if __name__ == "__main__":
    main()
