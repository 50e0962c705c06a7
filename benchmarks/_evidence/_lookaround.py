"""Lookaround beside what takes as many gradient steps on the same views, for rates and lengths of the run."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

import torch
from timm.optim import Lookahead
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from _evidence._fit import Part, accuracy, loader
from _evidence._protocol import Place, Protocol, Scores
from _evidence._small import copied, digits, perceptron
from _evidence._views import VIEWS, InTurn
from lightning_merge.optim import Lookaround
from lightning_merge.rules import ExponentialMean

CONTESTANTS = ("SGD", "EMA", "Lookahead", "Lookaround")


@dataclass
class Map(Protocol):
    """Rate by steps: each contestant takes so many gradient steps, batch t in view t mod 3, so in three views in turn.

    That is the paper's budget: its baselines take three updates for each batch. The rate falls to a fifth at 30, 60
    and 80 % of the run, as the authors' does. The last view of a length has every contestant at the rate that was best
    for it on validation images. A step of a Trainer takes three times as long as that of so small a network, so
    ``optim.Lookaround`` and the rule of EMA are used in a plain loop; the callbacks take the same steps (tests).
    """

    claim = "above SGD, SWA and Lookahead at equal gradient steps, 200 epochs of three passes, rate 0.1"
    beside = "SGD"

    images: int = 200
    validated_on: int = 400
    steps: tuple[int, ...] = (500, 2000)
    rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    around: int = 5
    batch: int = 32
    weight_decay: float = 5e-4

    def prepare(self, place: Place) -> None:
        self._train, self._val, self._test = digits(self.images, self.validated_on)

    def choose(self) -> dict[str, Any]:
        """The rate of each contestant at each length, by validation accuracy."""
        found: dict[str, Any] = {}
        for steps in self.steps:
            by = {rate: self._scores(rate, steps, 1000, self._val) for rate in self.rates}
            found[str(steps)] = {one: max(by, key=lambda rate, by=by, one=one: by[rate][one]) for one in CONTESTANTS}
        return {"rates": found}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        found: dict[str, dict[str, float]] = {}
        for steps in self.steps:
            by = {rate: self._scores(rate, steps, seed, self._test) for rate in self.rates}
            found |= {f"rate {rate:g}, {steps} steps": scores for rate, scores in by.items()}
            best = chosen["rates"][str(steps)]
            found[f"each at its best rate, {steps} steps"] = {one: by[best[one]][one] for one in CONTESTANTS}
        return found

    def _scores(self, rate: float, steps: int, seed: int, part: Part) -> dict[str, float]:
        found = {}
        for one in ("SGD", "Lookahead", "Lookaround"):
            torch.manual_seed(seed)
            module = perceptron()
            sgd = torch.optim.SGD(module.parameters(), rate, momentum=0.9, weight_decay=self.weight_decay)
            if one == "Lookaround":
                lookaround = Lookaround(sgd, len(VIEWS), self.around)
                self._train_with(module, lookaround, sgd, steps, seed)
                with lookaround.averaged():
                    weights = copied(module)
            elif one == "Lookahead":
                self._train_with(module, Lookahead(sgd, alpha=0.5, k=self.around), sgd, steps, seed)
                weights = copied(module)
            else:
                average = self._train_with(module, sgd, sgd, steps, seed, ema=True)
                weights = copied(module)
                found["EMA"] = accuracy(module, average, part, "cpu")
            found[one] = accuracy(module, weights, part, "cpu")
        return found

    def _train_with(
        self, module: nn.Module, optimizer: Any, sgd: torch.optim.Optimizer, steps: int, seed: int, ema: bool = False
    ) -> Mapping[str, Tensor]:
        """Trains; returns the average with a half-life of a twentieth of the run, or nothing."""
        schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [int(share * steps) for share in (0.3, 0.6, 0.8)], 0.2)
        rule = ExponentialMean(0.5 ** (20 / steps))
        state = rule.init(copied(module)) if ema else {}
        torch.manual_seed(seed)
        batches = InTurn(loader(self._train, self.batch, training=True))
        for images, labels in islice(chain.from_iterable(repeat(batches)), steps):
            optimizer.zero_grad()
            cross_entropy(module(images), labels).backward()
            optimizer.step()
            schedule.step()
            if ema:
                rule.update(state, module.state_dict())
        return rule.result(state) or {} if ema else {}


def lookaround(size: str) -> Map:
    return Map() if size == "small" else Map(steps=(500, 2000, 8000, 32000), rates=(0.01, 0.03, 0.1, 0.3))
