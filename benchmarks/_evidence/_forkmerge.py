"""ForkMerge where a task helps and another hurts: a target with few labels, and two tasks through the same head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import QUIET
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from _evidence._fit import Part, accuracy, loader
from _evidence._protocol import Place, Protocol, Scores
from _evidence._small import digits, perceptron
from lightning_merge.callbacks import ForkMerge

ALONE, HELPFUL, HARMFUL = {"target": 1.0}, {"target": 1.0, "helpful": 1.0}, {"target": 1.0, "harmful": 1.0}
FIXED: dict[str, dict[str, float]] = {
    "target alone": ALONE,
    "equal weighting, helpful": HELPFUL,
    "equal weighting, harmful": HARMFUL,
    "equal weighting, both": HELPFUL | HARMFUL,
}
FORKS: dict[str, dict[str, dict[str, float]]] = {
    "helpful": {"target": ALONE, "helpful": HELPFUL},
    "harmful": {"target": ALONE, "harmful": HARMFUL},
    "both": {"target": ALONE, "helpful": HELPFUL, "harmful": HARMFUL},
}


class Tasks(pl.LightningModule):
    """Trains on fixed weights of its tasks, or leaves them to ``ForkMerge``, which searches by loss or by accuracy."""

    def __init__(self, rate: float, tasks: Mapping[str, float] | None, searched_by: str, searched_on: Part) -> None:
        super().__init__()
        self.network = perceptron()
        self.rate, self.tasks, self.searched_by, self.searched_on = rate, tasks, searched_by, searched_on

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.network(images)
        return found

    def training_step(self, batch: dict[str, Part], batch_idx: int) -> Any:
        losses = {name: lambda part=part: cross_entropy(self(part[0]), part[1]) for name, part in batch.items()}
        if self.tasks is None:
            return {"losses": losses}
        return sum(weight * losses[task]() for task, weight in self.tasks.items())

    def score_step(self, batch: Part) -> tuple[Tensor, int]:
        found, labels = self(batch[0]), batch[1]
        if self.searched_by == "accuracy":
            return (found.argmax(1) == labels).sum(), len(labels)
        return -cross_entropy(found, labels, reduction="sum"), len(labels)

    def merge_dataloader(self) -> DataLoader[Part]:
        return loader(self.searched_on, len(self.searched_on[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), self.rate, momentum=0.9)


@dataclass
class Forks(Protocol):
    """Digits with few labels; a helpful task from another domain, and a harmful one with wrong labels.

    The helpful domain has images moved by a pixel and at half the contrast. The harmful task has the same images as
    they are, as the target's, with labels three higher, modulo ten. All go through the same head. ForkMerge searches
    on labelled images that train nothing. The paper's budget is equal steps of each branch; in the other all
    contestants take as many gradient steps in total. The last view is the first measured on the images that were
    searched on: how much a search flatters itself.
    """

    claim = (
        "above the target alone and above equal weighting of all tasks, at equal steps of every branch"
        " (six data sets, ResNet-101 and others)"
    )
    beside = "target alone"

    labels: int = 40
    domain: int = 800
    searched_on: int = 150
    steps: int = 300
    merges: int = 6
    batch: int = 32
    rates: tuple[float, ...] = (0.05,)
    margins: tuple[float, ...] = (0.05,)
    margin_of_accuracy: float = 0.02

    def prepare(self, place: Place) -> None:
        pass

    def choose(self) -> dict[str, Any]:
        """The rate of each contestant, by accuracy on the images that ForkMerge searches on, at the paper's budget."""
        if len(self.rates) == 1:
            return {"rates": dict.fromkeys(self._contestants(), self.rates[0])}
        parts = self._parts(1000)
        rates = {}
        for one in self._contestants():
            scores = {rate: self._trained(one, self.steps, rate, parts, 1000)[0] for rate in self.rates}
            rates[one] = max(scores, key=lambda rate, scores=scores: scores[rate])
        return {"rates": rates}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        parts, total = self._parts(seed), self.steps
        each, in_total = f"{self.steps} steps of each branch", f"{total} steps in total"
        searched = f"{each}, measured on the images searched on"
        found: dict[str, dict[str, float]] = {each: {}, in_total: {}, searched: {}}
        for one, (_, branches, _, _) in self._contestants().items():
            rate = chosen["rates"][one]
            found[searched][one], found[each][one] = self._trained(one, self.steps, rate, parts, seed)
            found[in_total][one] = found[each][one]
            if branches:
                found[in_total][one] = self._trained(one, total // len(branches), rate, parts, seed)[1]
        return found

    def _contestants(self) -> dict[str, tuple[Mapping[str, float] | None, Mapping[str, Any], str, float]]:
        """Fixed weights, or branches with what is searched by and the margin."""
        found: dict[str, tuple[Any, Any, str, float]] = {name: (tasks, {}, "", 0.0) for name, tasks in FIXED.items()}
        for name, branches in FORKS.items():
            found[f"ForkMerge, {name}"] = None, branches, "loss", 0.0
            for margin in self.margins if name != "helpful" else ():
                found[f"ForkMerge, {name}, min_gain {margin:g}"] = None, branches, "loss", margin
            found[f"ForkMerge, {name}, by accuracy"] = None, branches, "accuracy", 0.0
            margin = self.margin_of_accuracy
            if name != "helpful":
                found[f"ForkMerge, {name}, by accuracy, min_gain {margin:g}"] = None, branches, "accuracy", margin
        return found

    def _parts(self, seed: int) -> dict[str, Part]:
        target, (images, labels), searched, test = digits(self.labels, self.domain, self.searched_on, seed=seed)
        moved = 0.5 * torch.roll(images, 1, dims=3)
        return {
            "target": target,
            "helpful": (moved, labels),
            "harmful": (images, (labels + 3) % 10),
            "searched": searched,
            "test": test,
        }

    def _trained(self, one: str, steps: int, rate: float, parts: Mapping[str, Part], seed: int) -> tuple[float, float]:
        """Accuracy on the images searched on, and on the test images, of what a run leaves in the module."""
        tasks, branches, by, margin = self._contestants()[one]
        pl.seed_everything(seed, verbose=False)
        module = Tasks(rate, tasks, by, parts["searched"])
        draw = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(steps):
            batch = {}
            for name, count in (("target", self.labels), ("domain", self.domain)):
                chosen = torch.randint(count, (self.batch,), generator=draw)
                for task in ("target",) if name == "target" else ("helpful", "harmful"):
                    batch[task] = parts[task][0][chosen], parts[task][1][chosen]
            batches.append(batch)
        forks = [ForkMerge(branches, steps // self.merges, min_gain=margin)] if branches else []
        trainer = pl.Trainer(**QUIET, max_epochs=1, callbacks=forks, limit_val_batches=0)
        trainer.fit(module, DataLoader(batches, batch_size=None))
        searched, test = (accuracy(module, {}, parts[name], "cpu") for name in ("searched", "test"))
        return searched, test


def forkmerge(size: str) -> Forks:
    return Forks() if size == "small" else Forks(labels=40, steps=3000, merges=20, rates=(0.02, 0.05, 0.1))
