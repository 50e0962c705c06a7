"""Tasks in turn from a pretrained network: merging against naive fine-tuning, EWC, and all tasks at once."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import continual
import lightning.pytorch as pl
import torch
from _shared import progress
from torch.utils.data import DataLoader

from _evidence._fit import Part, loader
from _evidence._pretrained import Pretrained
from _evidence._protocol import Place, Protocol, Scores
from _evidence._renderings import rendered
from lightning_merge.continual import PRESETS, Split
from lightning_merge.recipes import Classifier, split_by_class

SEEN, TOLD, FORGETTING = "all classes", "told the task", "forgetting, told the task"


class Split10(pl.LightningDataModule):
    """Images or activations in memory; ``test`` measures the test part, or one held out of training."""

    def __init__(self, train: Part, test: Part, batch: int) -> None:
        super().__init__()
        self.train, self.test, self.batch = train, test, batch

    def train_dataloader(self) -> DataLoader[Any]:
        return loader(self.train, self.batch, training=True)

    def test_dataloader(self) -> DataLoader[Any]:
        return loader(self.test, 500)


@dataclass
class Tasks(Protocol):
    """Split CIFAR-10: five tasks of two classes in an order that the seed draws, each trained with Adam on its own.

    Settings of a method (rate, scale, strength) are searched on validation images and a stream that is not reported, by
    accuracy told the task. Statistics of BatchNorm stay ImageNet's. The loss is among the classes of the task.
    """

    claim = "pretrained ViT: MagMax and means of task vectors > sequential fine-tuning, without replay"
    beside = "naive"

    tasks: int = 5
    images: int = 2000
    test_images: int = 1000
    validated_on: float = 0.25
    size: int = 96
    frozen: int = 9
    epochs: int = 3
    batch: int = 32
    rates: tuple[float, ...] = (1e-4, 5e-4)
    methods: tuple[str, ...] = ("naive", "joint", "ewc", *PRESETS)

    def prepare(self, place: Place) -> None:
        self._network = Pretrained(10, self.size, self.frozen, place.device, place.cache)
        parts = rendered(place.data, ("photographs",), self.images, self.test_images)["photographs"]
        held, (pixels, labels) = int(self.validated_on * self.images), parts["train"]
        inputs = self._network.activations(pixels)
        self._train, self._val = (inputs[held:], labels[held:]), (inputs[:held], labels[:held])
        self._test = self._network.activations(parts["test"][0]), parts["test"][1]
        self._accelerator = "cpu" if place.device == "cpu" else "gpu"

    def choose(self) -> dict[str, Any]:
        found: dict[str, Any] = {}
        stores: dict[float, dict[Any, Any]] = {rate: {} for rate in self.rates}
        for name in self.methods:
            best = -1.0
            for rate in self.rates:
                for method in grid(name):
                    progress(f"{method}, rate {rate:g}")
                    record = self._record(method, rate, 1000, self._val, stores[rate])
                    score = record["metrics"]["accuracy_in_task"]["final_average"]
                    if score > best:
                        best, found[name] = score, {"method": method.__dict__, "rate": rate, "validation": score}
        return found

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        scores: dict[str, dict[str, float]] = {SEEN: {}, TOLD: {}, FORGETTING: {}}
        stores: dict[float, dict[Any, Any]] = {rate: {} for rate in self.rates}
        for name in self.methods:
            method, rate = continual.Method(**chosen[name]["method"]), chosen[name]["rate"]
            metrics = self._record(method, rate, seed, self._test, stores[rate])["metrics"]
            scores[SEEN][name] = 100 * metrics["accuracy"]["final_average"]
            scores[TOLD][name] = 100 * metrics["accuracy_in_task"]["final_average"]
            if "forgetting" in metrics["accuracy_in_task"]:
                scores[FORGETTING][name] = 100 * metrics["accuracy_in_task"]["forgetting"]
        return scores

    def _record(self, method: Any, rate: float, seed: int, test: Part, store: dict[Any, Any]) -> dict[str, Any]:
        setting = continual.Setting(
            "", "", 10, 0, 0, 0, base_epochs=0, epochs=self.epochs, accelerator=self._accelerator
        )
        data = Split10(self._train, test, self.batch)
        tasks = split_by_class(data, Split.of(10, tasks=self.tasks, seed=seed))
        module = Classifier(
            self._network.rest(seed), 10, optimizer=lambda parameters: torch.optim.Adam(parameters, rate)
        )
        return continual.measured(setting, tasks, module, method, seed, store)


def grid(name: str) -> list[Any]:
    """The settings that ``continual.py`` compares, with buffers that stay as they are."""
    if name == "joint":
        return [continual.Method("joint")]
    return list(dict.fromkeys(replace(method, buffers="copy") for method in continual.grid(name, "copy")))


def tasks(size: str) -> Tasks:
    if size == "small":
        return Tasks()
    return Tasks(images=20_000, test_images=10_000, size=160, frozen=0, rates=(1e-5, 5e-5))
