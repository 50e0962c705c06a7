"""Populations of branches: members, their mean, their ensemble, beside members that know nothing of each other."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from _evidence._fit import Part, accuracy, fit, loader, logits
from _evidence._protocol import Place, Protocol, Scores
from _evidence._small import digits, perceptron
from _evidence._views import VIEWS, InTurn
from lightning_merge.branches import Average, BestMix, Combine, SoftmaxOfScores
from lightning_merge.callbacks import DART, PAPA, WARP, WASH, Branching, DiLoCo, LocalSGD
from lightning_merge.combiners import ModelStock
from lightning_merge.schedules import EveryNSteps
from lightning_merge.search import Greedy

APART, MEMBERS = "independent members", ", mean of members"
Weights = Mapping[str, Tensor]


@dataclass
class Populations(Protocol):
    """Digits with 200 labels and three members, each in a view of its own, on the same batches, from the same start.

    The papers' budget is equal steps of each member, so three times the gradient steps of a single run; the last row is
    a single run of as many gradient steps as all members take, in the three views in turn. The rate is constant, the
    same for all in the small size and searched for each in the full one. Branches that are scored are so on validation
    images.
    """

    claim = (
        "PAPA, WASH: the soup above the mean of independent members and far above their soup, near their ensemble;"
        " DART: above plain training; local SGD, DiLoCo: as good as synchronous training"
    )
    beside = f"{APART}{MEMBERS}"

    images: int = 200
    validated_on: int = 400
    steps: tuple[int, ...] = (300,)
    rates: tuple[float, ...] = (0.1,)
    pulls: tuple[float, ...] = (0.05,)
    batch: int = 32

    def prepare(self, place: Place) -> None:
        self._train, self._val, self._test = digits(self.images, self.validated_on)

    def choose(self) -> dict[str, Any]:
        """The rate of each contestant at the smallest budget, by validation accuracy."""
        steps = min(self.steps)
        if len(self.rates) == 1:
            return {"rates": dict.fromkeys(self._makers(steps), self.rates[0])}
        by = {
            rate: self._scores(dict.fromkeys(self._makers(steps), rate), steps, 1000, self._val) for rate in self.rates
        }
        return {"rates": {one: max(by, key=lambda rate, one=one: by[rate][one]) for one in self._makers(steps)}}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        return {
            f"{steps} steps of each member": self._scores(chosen["rates"], steps, seed, self._test)
            for steps in self.steps
        }

    def _makers(self, steps: int) -> dict[str, Callable[[], Branching] | None]:
        """By contestant, its callback; ``None`` for a single run."""
        view, tenth = {"augmentations": VIEWS, "batches": "same"}, EveryNSteps(steps // 10)
        last = {**view, "score": _minus_loss}
        pulled = {f"PAPA, pull {pull:g}": lambda pull=pull: PAPA(3, pull=pull, **view) for pull in self.pulls}
        return {
            APART: lambda: Branching(Average(), EveryNSteps(10**9), 3, **view),
            **pulled,
            "PAPA-all": lambda: Branching(Average(), tenth, 3, **view),
            "WASH": lambda: WASH(3, share=0.05, **view),
            "DART": lambda: DART(3, steps // 10, **view),
            "local SGD": lambda: LocalSGD(3, 8, **view),
            "post-local SGD": lambda: LocalSGD(3, 8, start=0.5, **view),
            "DiLoCo": lambda: DiLoCo(3, 50, **view),
            "periodic Model Stock": lambda: Branching(Combine(ModelStock()), tenth, 3, **view),
            "LM-Cocktail weights": lambda: Branching(SoftmaxOfScores(0.05), tenth, 3, **last),
            "greedy soup of branches": lambda: Branching(BestMix(Greedy(), previous=False), tenth, 3, **last),
            "WARP": lambda: WARP(3, steps // 10, scale=0.9, **view),
            "single run of as many steps as a member": None,
            "single run of as many steps as all members": None,
        }

    def _scores(self, rates: Mapping[str, float], steps: int, seed: int, part: Part) -> dict[str, float]:
        found = {}
        for one, make in self._makers(steps).items():
            callback = make() if make else None
            module, members = self._trained(callback, rates[one], steps * (3 if "all members" in one else 1), seed)
            whole = {} if callback is None else callback.merged_weights() or {}
            found[one] = accuracy(module, whole, part, "cpu")
            if members:
                each = torch.stack([logits(module, weights, part[0], "cpu") for weights in members])
                found[f"{one}{MEMBERS}"] = 100 * float((each.argmax(2) == part[1]).float().mean())
                right = each.softmax(2).mean(0).argmax(1) == part[1]
                found[f"{one}, ensemble"] = 100 * float(right.float().mean())
        found["naive soup"] = found.pop(APART)
        return found

    def _trained(self, callback: Branching | None, rate: float, steps: int, seed: int) -> tuple[Any, list[Weights]]:
        batches = loader(self._train, self.batch, training=True)
        torch.manual_seed(seed)
        module = fit(
            perceptron(),
            batches if callback else InTurn(batches),
            optimizer=lambda parameters: torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=5e-4),
            steps=steps,
            seed=seed,
            device="cpu",
            callbacks=[callback] if callback else [],
            val=loader(self._val, 400),
            val_every=steps,
        )
        return module, members_of(callback) if callback else []


def members_of(callback: Branching) -> list[Weights]:
    """The weights of each branch as it ended."""
    branches, raw = callback._running.branches, callback.raw_weights()
    return [raw if each == branches.active else branches.weights(each) for each in range(branches.count)]


def _minus_loss(module: Any, batch: Part) -> tuple[Tensor, int]:
    return -cross_entropy(module(batch[0]), batch[1], reduction="sum"), len(batch[1])


def population(size: str) -> Populations:
    return (
        Populations()
        if size == "small"
        else Populations(steps=(600, 2400, 9600), rates=(0.02, 0.05, 0.1), pulls=(0.01, 0.05))
    )
