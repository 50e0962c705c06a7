"""Averages of a run at a constant learning rate against runs whose rate falls to 0, at every budget."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from _evidence._fit import Part, accuracy, every_set, fit, loader
from _evidence._protocol import Place, Protocol, Scores
from lightning_merge.callbacks import EMA, LAWA, WeightMerging
from lightning_merge.recipes import CIFAR, Digits, SmallConvNet, SmallResNet
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection

AGAIN = "statistics again"
CONSTANT = ("constant rate", f"constant rate, {AGAIN}", "EMA", "SWA", "LAWA")
DECAYED = ("cosine to 0", f"cosine to 0, {AGAIN}", "cosine to 0, EMA")


@dataclass
class Budgets(Protocol):
    """The same network trained for each number of steps, once at a constant rate and once with a cosine to 0.

    EMA, SWA and LAWA read the runs at the constant rate, of which each is the beginning of the longer ones: what they
    give at a budget needs no schedule that ends there. The run with a cosine is begun anew for every budget. SWA and
    LAWA measure BatchNorm's statistics again, so they are held against plain weights with statistics measured again.
    """

    claim = "EMA, SWA, LAWA of a constant or high rate: no schedule is needed, and the model is better at any step"
    beside = DECAYED[1]
    by_budget = True

    images: str = "digits"
    model: str = "small conv net"
    budgets: tuple[int, ...] = (20, 40, 80, 160)
    rates: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    batch: int = 64
    weight_decay: float = 5e-4

    def prepare(self, place: Place) -> None:
        self._device = place.device
        if self.images == "digits":
            data: Digits | CIFAR = Digits(batch_size=self.batch, shift=0)
        else:
            root = place.data / "cifar10"
            if not root.is_dir():
                raise FileNotFoundError(f"no CIFAR-10 in {root}: say with --data which folder holds cifar10/.")
            data = CIFAR("cifar10", root=str(root), batch_size=self.batch)
        for stage in ("fit", "test"):
            data.setup(stage)
        self._parts = {"val": _whole(data.val_dataloader()), "test": _whole(data.test_dataloader())}
        self._train = data.train_dataloader()
        if isinstance(data, Digits):  # which hands out one image at a time: that takes longer than a step
            self._train = loader(_whole(DataLoader(data.train, 500)), self.batch, training=True)

    def choose(self) -> dict[str, Any]:
        """The learning rate of each contestant, by validation accuracy at the second longest budget."""
        budget = sorted(self.budgets)[-2]
        scores: dict[str, dict[float, float]] = {}
        for rate in self.rates:
            for decayed in (False, True):
                for one, value in self._scores("val", budget, rate, decayed, 1000).items():
                    scores.setdefault(one, {})[rate] = value
        rates = {one: max(by, key=lambda rate, by=by: by[rate]) for one, by in scores.items()}
        return {"rates": rates, "validation accuracy": {one: list(by.values()) for one, by in scores.items()}}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        found: dict[str, dict[str, float]] = {}
        for budget in self.budgets:
            view = found.setdefault(f"{budget} steps", {})
            for contestants, decayed in ((CONSTANT, False), (DECAYED, True)):
                for rate in sorted({chosen["rates"][one] for one in contestants}):
                    wanted = [one for one in contestants if chosen["rates"][one] == rate]
                    view |= self._scores("test", budget, rate, decayed, seed, wanted)
        return {view: {one: of_view[one] for one in (*CONSTANT, *DECAYED)} for view, of_view in found.items()}

    def _scores(
        self, part: str, budget: int, rate: float, decayed: bool, seed: int, wanted: list[str] | None = None
    ) -> dict[str, float]:
        """Accuracy of the contestants that read one run."""

        def sgd(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=self.weight_decay)

        def cosine(optimizer: torch.optim.Optimizer) -> Any:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 + 0.5 * math.cos(math.pi * s / budget))

        averages = decayed_averages(budget) if decayed else constant_averages(budget)
        pl.seed_everything(seed, verbose=False)
        module = fit(
            self._network(),
            self._train,
            optimizer=sgd,
            schedule=cosine if decayed else None,
            steps=budget,
            seed=seed,
            device=self._device,
            callbacks=list(averages.values()),
        )
        sets = every_set(averages, DECAYED[0] if decayed else CONSTANT[0])
        names = list(sets) if wanted is None else wanted
        return {one: accuracy(module, sets[one], self._parts[part], self._device) for one in names}

    def _network(self) -> nn.Module:
        return SmallConvNet() if self.model == "small conv net" else SmallResNet(blocks=1, width=16)


def constant_averages(budget: int) -> dict[str, WeightMerging]:
    """As a run that stops here would have them: a half-life of a twentieth, means of the last quarter."""
    last_quarter = EveryNSteps(max(budget // 40, 1), start=0.75)
    return {
        CONSTANT[1]: last(budget),
        "EMA": EMA(half_life="5%"),
        "SWA": WeightMerging(Mean(), last_quarter, Selection(buffers="recompute"), name="swa"),
        "LAWA": LAWA(k=6, every_n_steps=max(budget // 24, 1)),
    }


def decayed_averages(budget: int) -> dict[str, WeightMerging]:
    return {DECAYED[1]: last(budget), DECAYED[2]: EMA(half_life="5%")}


def last(budget: int) -> WeightMerging:
    """The last weights, with statistics that are measured again."""
    return WeightMerging(Mean(), EveryNSteps(budget), Selection(buffers="recompute"), name="last")


def digits_budgets(size: str) -> Budgets:
    return Budgets(budgets=(20, 40, 80, 160, 320, 640)) if size == "full" else Budgets()


def cifar10_budgets(size: str) -> Budgets:
    budgets = (1000, 2000, 4000, 8000, 16000) if size == "full" else (250, 500, 1000)
    return Budgets("cifar10, 45,000", "ResNet-8, 16 wide", budgets, rates=(0.02, 0.05, 0.1))


def _whole(batches: Any) -> Part:
    parts: list[tuple[Tensor, Tensor]] = list(batches)
    return torch.cat([inputs for inputs, _ in parts]), torch.cat([labels for _, labels in parts])
