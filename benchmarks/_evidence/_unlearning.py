"""A task that is subtracted: its whole vector, or the part that Ext-Sub or Ethos chooses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from _evidence._fit import Part, accuracy, fit, loader
from _evidence._protocol import Place, Protocol, Scores
from _evidence._small import copied, momentum_sgd, parts_of_recipe, perceptron
from _evidence._tangent import TASKS
from lightning_merge.combiners import add_vector, ethos, ext_sub, negate, task_vector
from lightning_merge.recipes.vision._classifier import Classifier
from lightning_merge.weights import Weights

ALL = {"plain": lambda images: images, **TASKS}


@dataclass
class Unlearning(Protocol):
    """A perceptron trained on five renderings of digits is fine-tuned on one of them, and on the four others.

    The second vector stays and the first is subtracted, by the largest scale for which validation accuracy on the four
    others is 95 % of what it was; each of the five is forgotten once. Scores are means over the five.
    """

    claim = "a part of the vector, chosen by a projection, forgets as much at less loss elsewhere than the whole"
    beside = "whole vector"

    hidden: int = 64
    steps: int = 300
    start_steps: int = 1000
    batch: int = 64
    rate: float = 0.03
    keep: float = 0.95
    scales: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(1, 41))

    def prepare(self, place: Place) -> None:
        self._device = place.device
        self._parts = parts_of_recipe()

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        start = self._trained(None, tuple(ALL), 0.1, self.start_steps, seed)
        error: dict[str, list[float]] = {}
        control: dict[str, list[float]] = {}
        for task in ALL:
            others = tuple(each for each in ALL if each != task)
            harmful = task_vector(self._trained(start, (task,), self.rate, self.steps, seed), start)
            expert = task_vector(self._trained(start, others, self.rate, self.steps, seed), start)
            good = add_vector(start, expert)
            parts = {
                "nothing": None,
                "whole vector": harmful,
                "Ext-Sub": ext_sub(harmful, expert),
                "Ethos": ethos(harmful, good),
            }
            for name, part in parts.items():
                weights = good if part is None else self._without(good, part, others)
                error.setdefault(name, []).append(100 - self._score(weights, task, "test"))
                control.setdefault(name, []).append(self._mean(weights, others, "test"))
        views = {"error on what is forgotten": error, "accuracy on the others": control}
        return {view: {name: sum(each) / len(each) for name, each in found.items()} for view, found in views.items()}

    def _without(self, good: Weights, part: Weights, others: tuple[str, ...]) -> Weights:
        """Along the part as far as the others allow on validation data."""
        least, found = self.keep * self._mean(good, others, "val"), good
        for scale in self.scales:
            weights = add_vector(good, negate(part, scale))
            if self._mean(weights, others, "val") < least:
                break
            found = weights
        return found

    def _trained(self, start: Weights | None, tasks: tuple[str, ...], rate: float, steps: int, seed: int) -> Weights:
        images, labels = self._parts["train"]
        part: Part = torch.cat([ALL[task](images) for task in tasks]), labels.repeat(len(tasks))
        torch.manual_seed(seed)
        network = perceptron(self.hidden)
        if start is not None:
            network.load_state_dict({name.removeprefix("model."): each for name, each in start.items()})
        module = fit(
            network,
            loader(part, self.batch, training=True),
            optimizer=momentum_sgd(rate),
            steps=steps,
            seed=seed,
            device=self._device,
        )
        return copied(module)

    def _mean(self, weights: Weights, tasks: tuple[str, ...], part: str) -> float:
        return sum(self._score(weights, task, part) for task in tasks) / len(tasks)

    def _score(self, weights: Weights, task: str, part: str) -> float:
        images, labels = self._parts[part]
        return accuracy(Classifier(perceptron(self.hidden), 10), weights, (ALL[task](images), labels), self._device)


def unlearning(size: str) -> Unlearning:
    return Unlearning(hidden=1024, steps=1000) if size == "full" else Unlearning()
