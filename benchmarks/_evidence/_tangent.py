"""Task vectors of fine-tunings in the tangent space beside those of the network itself, summed."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from _evidence._fit import Part, accuracy, fit, loader
from _evidence._protocol import Place, Protocol, Scores
from _evidence._small import copied, momentum_sgd, parts_of_recipe, perceptron
from lightning_merge.callbacks import Linearize
from lightning_merge.combiners import Sum, add_vector, task_vector
from lightning_merge.recipes.vision._classifier import Classifier
from lightning_merge.tangent import linearize
from lightning_merge.weights import Weights

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
        self._parts = parts_of_recipe()

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

    def _fine_tuned(self, seed: int, rate: float, linear: bool) -> tuple[Weights, list[Weights]]:
        """The start and the weights after each task."""

        def trained(network: nn.Module, part: Part, rate: float, steps: int, *callbacks: pl.Callback) -> Weights:
            module = fit(
                network,
                loader(part, self.batch, training=True),
                optimizer=momentum_sgd(rate),
                steps=steps,
                seed=seed,
                device=self._device,
                callbacks=callbacks,
            )
            return copied(module)

        images, labels = self._parts["train"]
        pl.seed_everything(seed, verbose=False)
        start = trained(perceptron(self.hidden), (images, labels), 0.1, self.start_steps)
        tasks = []
        for change in TASKS.values():
            network = perceptron(self.hidden)
            network.load_state_dict({name.removeprefix("model."): each for name, each in start.items()})
            callbacks = [Linearize("model")] if linear else []
            tasks.append(trained(network, (change(images), labels), rate, self.steps, *callbacks))
        return start, tasks

    def _own(self, start: Weights, tasks: list[Weights], linear: bool, part: str) -> float:
        scores = [self._score(start, each, linear, part, name) for name, each in zip(TASKS, tasks, strict=True)]
        return sum(scores) / len(scores)

    def _mean(self, start: Weights, weights: Weights, linear: bool, part: str) -> float:
        return sum(self._score(start, weights, linear, part, name) for name in TASKS) / len(TASKS)

    def _score(self, start: Weights, weights: Weights, linear: bool, part: str, task: str) -> float:
        module = Classifier(perceptron(self.hidden), 10)
        module.load_state_dict(start)
        if linear:
            linearize(module, "model")
        images, labels = self._parts[part]
        return accuracy(module, weights, (TASKS[task](images), labels), self._device)


def tangent_space(size: str) -> TangentSpace:
    return TangentSpace(hidden=1024, steps=1000) if size == "full" else TangentSpace()


def _summed(start: Weights, tasks: list[Weights], scale: float) -> Weights:
    return add_vector(start, Sum(scale).combine(task_vector(task, start) for task in tasks))
