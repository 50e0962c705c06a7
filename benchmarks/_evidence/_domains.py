"""Averages against plain fine-tuning where it is measured on a domain that no training image came from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import progress
from torch import Tensor

from _evidence._fit import Part, accuracy, every_set, fit, loader
from _evidence._pretrained import Pretrained
from _evidence._protocol import Place, Protocol, Scores
from _evidence._renderings import rendered
from lightning_merge.callbacks import EMA, SMA, SWAD, BestK, WeightMerging
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNSteps
from lightning_merge.selections import Selection

ALL = "mean of the domains left out"
CONTESTANTS = ("ERM", "ERM, best validated", "SWAD", "SMA", "EMA", "SWA")


@dataclass
class Domains(Protocol):
    """Leave one domain out: fine-tuned on three renderings of CIFAR-10, measured on test images in the fourth.

    All contestants read the same run, so they have the same gradient steps. What decides (SWAD, SMA, the best validated
    weights) sees images of the three training domains. BatchNorm keeps ImageNet's statistics.
    """

    claim = "DomainBed, 5 data sets, ResNet-50, 5000 steps: SWAD 66.9 > SMA 66.5 > ERM 64.2 out of domain"
    beside = "ERM"

    domains: tuple[str, ...] = ("edges", "posterised", "inverted", "blurred")
    images: int = 400
    test_images: int = 500
    validated_on: float = 0.2
    size: int = 96
    frozen: int = 9
    steps: int = 150
    batch: int = 24
    validations: int = 15
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)

    def prepare(self, place: Place) -> None:
        self._device = place.device
        self._network = Pretrained(10, self.size, self.frozen, place.device, place.cache)
        self._parts: dict[str, dict[str, Part]] = {}
        for name, parts in rendered(place.data, list(self.domains), self.images, self.test_images).items():
            held, (pixels, labels) = int(self.validated_on * self.images), parts["train"]
            inputs = self._network.activations(pixels)
            test = self._network.activations(parts["test"][0]), parts["test"][1]
            train, val = (inputs[held:], labels[held:]), (inputs[:held], labels[:held])
            self._parts[name] = {"train": train, "val": val, "test": test}

    def choose(self) -> dict[str, Any]:
        """The learning rate of each contestant, by accuracy on validation images of the training domains."""
        scores: dict[str, dict[float, float]] = {one: dict.fromkeys(self.rates, 0.0) for one in CONTESTANTS}
        for target in self.domains:
            for rate in self.rates:
                progress(f"{target} left out, rate {rate:g}")
                module, sets = self._train(target, rate, 1000)
                for one, weights in sets.items():
                    found = accuracy(module, weights, self._of_others(target, "val"), self._device)
                    scores[one][rate] += found / len(self.domains)
        rates = {one: max(self.rates, key=lambda rate, one=one: scores[one][rate]) for one in CONTESTANTS}
        return {"rates": rates, "validation accuracy": {one: list(by.values()) for one, by in scores.items()}}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        found: dict[str, dict[str, float]] = {ALL: {}}
        for target in self.domains:
            found[target] = dict.fromkeys(CONTESTANTS, 0.0)
            for rate in sorted(set(chosen["rates"].values())):
                module, sets = self._train(target, rate, seed)
                for one in CONTESTANTS:
                    if chosen["rates"][one] == rate:
                        test = self._parts[target]["test"]
                        found[target][one] = accuracy(module, sets[one], test, self._device)
        for one in CONTESTANTS:
            found[ALL][one] = sum(found[target][one] for target in self.domains) / len(self.domains)
        return found

    def _of_others(self, target: str, part: str) -> Part:
        own = [parts[part] for name, parts in self._parts.items() if name != target]
        return torch.cat([inputs for inputs, _ in own]), torch.cat([labels for _, labels in own])

    def _train(self, target: str, rate: float, seed: int) -> tuple[pl.LightningModule, dict[str, Mapping[str, Tensor]]]:
        """The weights of every contestant after one run."""
        same = Selection(buffers="copy")  # the statistics do not move
        averages: dict[str, WeightMerging] = {
            "ERM, best validated": BestK("val/acc", k=1, selection=same),
            "SWAD": SWAD("val/loss", stop=False, selection=same),
            "SMA": SMA("val/acc", start_step=0.02, selection=same),
            "EMA": EMA(half_life="5%", validate="raw", selection=same),
            "SWA": WeightMerging(Mean(), EveryNSteps(10, start=0.75), same, validate="raw", name="swa"),
        }
        module = fit(
            self._network.rest(seed),
            loader(self._of_others(target, "train"), self.batch, training=True),
            optimizer=lambda parameters: torch.optim.Adam(parameters, rate),
            steps=self.steps,
            seed=seed,
            device=self._device,
            callbacks=list(averages.values()),
            val=loader(self._of_others(target, "val"), 500),
            val_every=self.steps // self.validations,
        )
        return module, every_set(averages, "ERM")


def domains(size: str) -> Domains:
    if size == "small":
        return Domains()
    return Domains(images=2000, size=160, frozen=0, steps=1000, rates=(2e-5, 5e-5, 2e-4))
