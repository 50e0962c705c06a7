"""Means of two networks from different starts: as they are, aligned, and with activations repaired."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from _evidence._fit import Part, accuracy, fit, loader
from _evidence._protocol import Place, Protocol, Scores
from lightning_merge.alignment import align
from lightning_merge.calibration import recalibrated_statistics, repair
from lightning_merge.recipes import Digits, SmallConvNet
from lightning_merge.recipes.vision._classifier import Classifier
from lightning_merge.soups import soup

Weights = dict[str, Tensor]


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
        data = Digits(shift=0)
        data.setup("fit")
        data.setup("test")
        self._train: Part = (data.train.images, data.train.labels)
        self._test: Part = data.test.tensors

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        return {
            "perceptron": self._view(self._perceptron, seed, 0.1),
            "convolutions with BatchNorm, statistics again": self._view(
                lambda: SmallConvNet(width=self.width), seed, 0.1
            ),
        }

    def _view(self, network: Any, seed: int, rate: float) -> dict[str, float]:
        one, two = (self._trained(network, 2 * seed + i, rate) for i in range(2))
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

    def _trained(self, network: Any, seed: int, rate: float) -> Weights:
        pl.seed_everything(seed, verbose=False)
        data = loader(self._train, self.batch, training=True)

        def sgd(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, rate, momentum=0.9)

        module = fit(network(), data, optimizer=sgd, steps=self.steps, seed=seed, device=self._device)
        return {name: each.detach().cpu().clone() for name, each in module.state_dict().items()}

    def _perceptron(self) -> nn.Module:
        hidden = [each for _ in range(2) for each in (nn.Linear(self.hidden, self.hidden), nn.ReLU())]
        return nn.Sequential(nn.Flatten(), nn.Linear(64, self.hidden), nn.ReLU(), *hidden, nn.Linear(self.hidden, 10))


def alignment(size: str) -> Alignment:
    return Alignment(hidden=1024, width=128, steps=4000) if size == "full" else Alignment()
