"""Soups of a sweep of fine-tunings from one pretrained start, where they were tuned and in other domains."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from _evidence._fit import Part, accuracy, fit, loader, logits
from _evidence._pretrained import Pretrained
from _evidence._protocol import Place, Protocol, Scores
from _evidence._renderings import rendered
from lightning_merge.combiners import ModelStock, add_vector, task_vector
from lightning_merge.search import Gradient, Greedy, search
from lightning_merge.soups import soup

IN, OUT = "in domain", "mean of the other domains"
Model = Mapping[str, Tensor]


@dataclass
class Soups(Protocol):
    """A sweep as in Model soups: each run draws its rate, weight decay, label smoothing and length; all have one start.

    The start is the pretrained network with a head trained by itself (a linear probe). Whatever is chosen (the best
    run, the greedy and the learned soup) is chosen on validation images of the training domain. All contestants come
    from the same runs; those that are one run had a share of their gradient steps, which is the claims' own budget.
    """

    claim = (
        "ViT-B/32, 72 fine-tunings: greedy soup > uniform soup and best single run, more so out of domain;"
        " WiSE-FT > fine-tuned out of domain; Model Stock of 2 runs ~ greedy soup; DiWA > single run out of domain"
    )
    beside = "best run"

    domain: str = "photographs"
    others: tuple[str, ...] = ("edges", "posterised", "inverted", "blurred")
    images: int = 1000
    test_images: int = 500
    validated_on: float = 0.3
    size: int = 96
    frozen: int = 9
    runs: int = 6
    probe_steps: int = 100
    steps: tuple[int, ...] = (100, 200)
    batch: int = 24
    rates: tuple[float, float] = (5e-5, 1e-3)

    def prepare(self, place: Place) -> None:
        self._device = place.device
        self._network = Pretrained(10, self.size, self.frozen, place.device, place.cache)
        names = (self.domain, *self.others)
        parts = rendered(place.data, names, self.images, self.test_images)
        held, (pixels, labels) = int(self.validated_on * self.images), parts[self.domain]["train"]
        inputs = self._network.activations(pixels)
        self._val, self._train = (inputs[:held], labels[:held]), (inputs[held:], labels[held:])
        tests = {name: parts[name]["test"] for name in names}
        self._tests: dict[str, Part] = {name: (self._network.activations(p), t) for name, (p, t) in tests.items()}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        self._module = self._network.rest(seed)
        start = self._probed(seed)
        runs = [self._tuned(start, seed, number) for number in range(self.runs)]
        models = self._models(start, runs, seed)
        found: dict[str, dict[str, float]] = {IN: {}, OUT: {}, **{name: {} for name in self.others}}
        for name, part in self._tests.items():
            view = found[IN if name == self.domain else name]
            view |= {one: accuracy(self._module, weights, part, self._device) for one, weights in models.items()}
            each = torch.stack([self._logits(run, part) for run in runs])
            view["mean of single runs"] = _percent(each.argmax(2) == part[1])
            view["ensemble"] = _percent(each.softmax(2).mean(0).argmax(1) == part[1])
        for one in found[IN]:
            found[OUT][one] = sum(found[name][one] for name in self.others) / len(self.others)
        return found

    def _models(self, start: Model, runs: list[Model], seed: int) -> dict[str, Model]:
        def score(coefficients: tuple[float, ...]) -> float:
            return self._right(soup(runs, list(coefficients)), self._val)

        def minus_loss(coefficients: tuple[float, ...]) -> float:
            mixed = soup(runs, list(coefficients))
            return -float(cross_entropy(self._logits(mixed, self._val), self._val[1]))

        best = max(runs, key=lambda run: self._right(run, self._val))
        learned = search(minus_loss, len(runs), Gradient(), budget=8 * self.runs, seed=seed)
        stock = ModelStock().combine([task_vector(run, start) for run in runs])
        return {
            "best run": best,
            "linear probe": start,
            "uniform soup, DiWA": soup(runs),
            "greedy soup": soup(runs, list(search(score, len(runs), Greedy(), seed=seed).coefficients)),
            "learned soup": soup(runs, list(learned.coefficients)),
            "Model Stock": {**start, **add_vector(start, stock)},
            "WiSE-FT 0.5 of the best run": soup([start, best]),
        }

    def _probed(self, seed: int) -> Model:
        network = self._network.rest(seed)
        head = network[-1]
        for parameter in network[:-1].parameters():
            parameter.requires_grad = False
        fit(
            network,
            loader(self._train, self.batch, training=True),
            optimizer=lambda _: torch.optim.Adam(head.parameters(), 1e-3),
            steps=self.probe_steps,
            seed=seed,
            device=self._device,
        )
        return _copied(network)

    def _tuned(self, start: Model, seed: int, number: int) -> Model:
        draw = random.Random(1000 * seed + number)
        low, high = self.rates
        rate, decay = low * (high / low) ** draw.random(), 10 ** draw.uniform(-4, -1)
        network = self._network.rest(seed)
        network.load_state_dict(start)
        fit(
            network,
            loader(self._train, self.batch, training=True),
            optimizer=lambda parameters: torch.optim.AdamW(parameters, rate, weight_decay=decay),
            steps=draw.choice(self.steps),
            smoothing=draw.choice((0.0, 0.1, 0.2)),
            seed=1000 * seed + number,
            device=self._device,
        )
        return _copied(network)

    def _right(self, model: Model, part: Part) -> float:
        return accuracy(self._module, model, part, self._device)

    def _logits(self, model: Model, part: Part) -> Tensor:
        return logits(self._module, model, part[0], self._device)


def _percent(right: Tensor) -> float:
    return 100 * float(right.float().mean())


def _copied(network: torch.nn.Module) -> Model:
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}


def soups(size: str) -> Soups:
    if size == "small":
        return Soups()
    return Soups(images=4000, size=160, frozen=0, runs=16, steps=(500, 1000), rates=(1e-5, 2e-4))
