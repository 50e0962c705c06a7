"""Means of two networks from different starts: as they are, aligned, and with activations repaired."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import nn

from _evidence._fit import accuracy, fit, loader
from _evidence._protocol import Place, Protocol, Scores
from _evidence._small import copied, momentum_sgd, parts_of_recipe
from lightning_merge.alignment import align
from lightning_merge.calibration import recalibrated_statistics, repair
from lightning_merge.recipes import SmallConvNet
from lightning_merge.recipes.vision._classifier import Classifier
from lightning_merge.soups import soup
from lightning_merge.weights import Weights


@dataclass
class Alignment(Protocol):
    """Two networks trained apart, from different starts and on different batches, and the middle between them."""

    claim = "networks from different starts merge with little loss once units are aligned, and less with REPAIR"
    beside = "mean as it is"

    hidden: int = 256
    width: int = 32
    steps: int = 400
    batch: int = 64

    def prepare(self, place: Place) -> None:
        self._device = place.device
        parts = parts_of_recipe()
        self._train, self._test = parts["train"], parts["test"]

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        return {
            "perceptron": self._view(self._perceptron, seed),
            "convolutions with BatchNorm, statistics again": self._view(lambda: SmallConvNet(width=self.width), seed),
        }

    def _view(self, network: Any, seed: int) -> dict[str, float]:
        one, two = (self._trained(network, 2 * seed + i) for i in range(2))
        module = Classifier(network(), 10)
        ordered = align(module, two, to=one)
        sets = {"mean as it is": soup([one, two]), "mean, aligned": soup([one, ordered])}
        batches = list(self._train[0].split(500))
        if any("running_mean" in name for name in one):
            for name, each in sets.items():
                module.load_state_dict(each)
                sets[name] = {**each, **recalibrated_statistics(module, batches, module)}
        else:
            for name, members in (("mean as it is", [one, two]), ("mean, aligned", [one, ordered])):
                sets[f"{name}, repaired"] = repair(module, sets[name], members, batches, module)
        scores = {name: accuracy(module, each, self._test, self._device) for name, each in sets.items()}
        members = [accuracy(module, each, self._test, self._device) for each in (one, two)]
        return {**scores, "the two networks": sum(members) / 2}

    def _trained(self, network: Any, seed: int) -> Weights:
        pl.seed_everything(seed, verbose=False)
        data = loader(self._train, self.batch, training=True)
        sgd = momentum_sgd(0.1)
        return copied(fit(network(), data, optimizer=sgd, steps=self.steps, seed=seed, device=self._device))

    def _perceptron(self) -> nn.Module:
        hidden = [each for _ in range(2) for each in (nn.Linear(self.hidden, self.hidden), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), nn.Linear(64, self.hidden), nn.ReLU(), *hidden, nn.Linear(self.hidden, 10))


def alignment(size: str) -> Alignment:
    return Alignment(hidden=1024, width=128, steps=4000) if size == "full" else Alignment()
