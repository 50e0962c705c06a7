"""Task vectors of fine-tunings in the tangent space beside those of the network itself, summed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from _evidence._fit import Part, accuracy, fit, loader
from _evidence._protocol import Place, Protocol, Scores
from lightning_merge.callbacks import Linearize
from lightning_merge.combiners import Sum
from lightning_merge.recipes import Digits
from lightning_merge.recipes.vision._classifier import Classifier
from lightning_merge.tangent import linearize

TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "upside down": lambda images: images.flip(-1, -2),
    "inverted": lambda images: 1 - images,
    "mirrored": lambda images: images.flip(-1),
    "lying": lambda images: images.transpose(-1, -2).flip(-1),
}
KINDS = {"network": False, "tangent space": True}


@dataclass
class TangentSpace(Protocol):
    """A perceptron trained on digits is fine-tuned on four renderings of them, each from there; vectors are summed.

    The rate of each kind of fine-tuning is searched by the validation accuracy of its own tasks, the scale of each sum
    by its mean over tasks; sums and single models have the same gradient steps.
    """

    claim = "task vectors of linearised fine-tunings sum to a better multi-task model than those of the network itself"
    beside = "sum, network"

    hidden: int = 64
    steps: int = 300
    batch: int = 64
    start_steps: int = 300
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    scales: tuple[float, ...] = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)

    def prepare(self, place: Place) -> None:
        self._device = place.device
        data = Digits(shift=0)
        data.setup("fit")
        data.setup("test")
        self._parts = {name: part.tensors for name, part in (("val", data.val), ("test", data.test))}
        self._parts["train"] = (data.train.images, data.train.labels)

    def choose(self) -> dict[str, Any]:
        rates, scales = {}, {}
        for kind, linear in KINDS.items():
            found = {rate: self._fine_tuned(1000, rate, linear) for rate in self.rates}
            own = {rate: self._own(*each, linear, "val") for rate, each in found.items()}
            rates[kind] = max(own, key=lambda rate, own=own: own[rate])
            start, tasks = found[rates[kind]]
            summed = {s: self._mean(start, _summed(start, tasks, s), linear, "val") for s in self.scales}
            scales[kind] = max(summed, key=lambda scale, summed=summed: summed[scale])
        return {"rates": rates, "scales": scales}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        view: dict[str, float] = {}
        for kind, linear in KINDS.items():
            start, tasks = self._fine_tuned(seed, chosen["rates"][kind], linear)
            view.setdefault("start", self._mean(start, start, False, "test"))
            view[f"own model of each task, {kind}"] = self._own(start, tasks, linear, "test")
            summed = _summed(start, tasks, chosen["scales"][kind])
            view[f"sum, {kind}"] = self._mean(start, summed, linear, "test")
        return {"mean over tasks": view}

    def _fine_tuned(self, seed: int, rate: float, linear: bool) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """The start and the weights after each task."""

        def sgd(rate: float) -> Callable[[Any], torch.optim.Optimizer]:
            return lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9)

        def trained(network: nn.Module, part: Part, rate: float, steps: int, *callbacks: pl.Callback) -> Classifier:
            data = loader(part, self.batch, training=True)
            return fit(
                network, data, optimizer=sgd(rate), steps=steps, seed=seed, device=self._device, callbacks=callbacks
            )

        images, labels = self._parts["train"]
        pl.seed_everything(seed, verbose=False)
        start = _weights(trained(self._network(), (images, labels), 0.1, self.start_steps))
        tasks = []
        for change in TASKS.values():
            network = self._network()
            network.load_state_dict({name.removeprefix("model."): each for name, each in start.items()})
            callbacks = [Linearize("model")] if linear else []
            tasks.append(_weights(trained(network, (change(images), labels), rate, self.steps, *callbacks)))
        return start, tasks

    def _own(self, start: dict[str, Tensor], tasks: list[dict[str, Tensor]], linear: bool, part: str) -> float:
        scores = [self._score(start, each, linear, part, name) for name, each in zip(TASKS, tasks, strict=True)]
        return sum(scores) / len(scores)

    def _mean(self, start: dict[str, Tensor], weights: dict[str, Tensor], linear: bool, part: str) -> float:
        return sum(self._score(start, weights, linear, part, name) for name in TASKS) / len(TASKS)

    def _score(self, start: dict[str, Tensor], weights: dict[str, Tensor], linear: bool, part: str, task: str) -> float:
        module = Classifier(self._network(), 10)
        module.load_state_dict(start)
        if linear:
            linearize(module, "model")
        images, labels = self._parts[part]
        return accuracy(module, weights, (TASKS[task](images), labels), self._device)

    def _network(self) -> nn.Module:
        return nn.Sequential(
            nn.Flatten(),
            *(nn.Linear(64, self.hidden), nn.ReLU()),
            *(nn.Linear(self.hidden, self.hidden), nn.ReLU()),
            nn.Linear(self.hidden, 10),
        )


def tangent_space(size: str) -> TangentSpace:
    return TangentSpace(hidden=1024, steps=1000) if size == "full" else TangentSpace()


def _summed(start: dict[str, Tensor], tasks: list[dict[str, Tensor]], scale: float) -> dict[str, Tensor]:
    merged = Sum(scale).combine({name: each - start[name] for name, each in task.items()} for task in tasks)
    return {name: each + start[name] for name, each in merged.items()}


def _weights(module: Classifier) -> dict[str, Tensor]:
    return {name: each.detach().cpu().clone() for name, each in module.state_dict().items()}
