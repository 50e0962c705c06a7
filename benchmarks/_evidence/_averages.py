"""Averages of a run that no other protocol has, and what takes the place of a schedule, beside a run that decays."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import schedulefree
import torch
from torch import Tensor

from _evidence._fit import accuracy, every_set, fit, loader
from _evidence._protocol import Place, Protocol, Scores
from _evidence._small import digits, perceptron
from _evidence._views import InTurn
from lightning_merge.callbacks import BEMA, EMA, SMA, TWA, BestK, EvaluationWeights, League, PostHocEMA, WeightMerging
from lightning_merge.rules import Mean
from lightning_merge.schedules import EveryNSteps

RAW, SHORT, FOUND = "constant rate", ", 65 % of the steps", "PostHocEMA, width found on validation"
Sets = tuple[Any, dict[str, Mapping[str, Tensor]]]


@dataclass
class Averages(Protocol):
    """One run at a constant rate, which most read; the same with a cosine to 0; shorter runs; a schedule-free one.

    The real average of a width is what ``PostHocEMA`` tracks; that of the same width made afterwards comes from two
    other widths and 20 copies. The width that is found has the highest validation accuracy of those made afterwards, as
    the league's winner has among all averages of the run and its last weights. TWA's run has 65 % of the
    steps, its second stage included. Schedule-free SGD takes ten times the rate, as its authors say. The rate
    is the same for all in the small size, and searched for each on validation images in the full one.
    """

    claim = (
        "PostHocEMA: any width after training; BEMA: above EMA without its lag; BestK, SMA: above the last weights;"
        " TWA: as good with 30 % fewer epochs; schedule-free: as good as a decayed rate"
    )
    beside = "cosine to 0"

    images: int = 400
    validated_on: int = 400
    steps: int = 900
    batch: int = 32
    rates: tuple[float, ...] = (0.05,)
    widths: tuple[float, ...] = (0.05, 0.1, 0.2)
    weight_decay: float = 5e-4

    def prepare(self, place: Place) -> None:
        self._train, self._val, self._test = digits(self.images, self.validated_on)

    def choose(self) -> dict[str, Any]:
        """The rate of each contestant, by validation accuracy."""
        if len(self.rates) == 1:
            return {"rates": {"all": self.rates[0]}}
        by = {rate: self._scores(rate, 1000)[0] for rate in self.rates}
        return {"rates": {one: max(by, key=lambda rate, one=one: by[rate][one]) for one in by[self.rates[0]]}}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        rates = dict(chosen["rates"])
        tests = {rate: self._scores(rate, seed)[1] for rate in sorted(set(rates.values()))}
        common = rates.pop("all", None)
        scores = tests[common] if common else {one: tests[rate][one] for one, rate in rates.items()}
        return {f"{self.steps} steps": scores}

    def _scores(self, rate: float, seed: int) -> tuple[dict[str, float], dict[str, float]]:
        """Accuracy of all contestants on validation and test images."""
        found: tuple[dict[str, float], dict[str, float]] = {}, {}
        for module, sets in (
            self._constant(rate, seed),
            self._decayed(rate, seed),
            self._short(rate, seed),
            self._free(rate, seed),
        ):
            for one, weights in sets.items():
                for scores, part in zip(found, (self._val, self._test), strict=True):
                    scores[one] = accuracy(module, weights, part, "cpu")
        widest = max((f"PostHocEMA, width {width:g}" for width in self.widths), key=found[0].__getitem__)
        for scores in found:
            scores[FOUND] = scores[widest]
            scores["League's winner"] = scores[self._winner]
        return found

    def _constant(self, rate: float, seed: int) -> Sets:
        every = self.steps // 20
        league: dict[str, WeightMerging] = {
            "EMA": EMA(half_life="5%", validate="raw", name="ema"),
            "BEMA": BEMA(validate="raw", name="bema"),
            "SWA": WeightMerging(Mean(), EveryNSteps(every // 2, start=0.75), validate="raw", name="swa"),
        }
        low, high = min(self.widths), max(self.widths)
        posthoc = PostHocEMA((low, high), every, validate="raw", name="posthoc")
        averages: dict[str, WeightMerging] = {
            "BestK": BestK("val/acc", k=5),
            "SMA": SMA("val/acc", start_step=0.05),
            **league,
            "posthoc": posthoc,
        }
        for width in self.widths:
            real = PostHocEMA((low / 2, width), every, validate="raw", name=f"real{100 * width:.0f}")
            averages[f"EMA of width {width:g}"] = real
        judge = League(list(league.values()), "val/acc")
        apart = [each for one, each in averages.items() if one not in league]
        module = self._fit(rate, self.steps, seed, [judge, *apart])
        sets = every_set(averages, RAW)
        sets[f"PostHocEMA, width {high:g}"] = sets.pop("posthoc")  # it tracks this width
        names = {each.name: one for one, each in averages.items()} | {"posthoc": f"PostHocEMA, width {high:g}"}
        self._winner = {"raw": RAW, **names}[judge.winner or "raw"]
        made = {f"PostHocEMA, width {width:g}": posthoc.synthesise(width) for width in self.widths}
        return module, {**sets, **{one: {**sets[RAW], **weights} for one, weights in made.items()}}

    def _decayed(self, rate: float, seed: int) -> Sets:
        return self._fit(rate, self.steps, seed, [], cosine=True), {self.beside: {}}

    def _short(self, rate: float, seed: int) -> Sets:
        steps = int(0.65 * self.steps)
        swa = WeightMerging(Mean(), EveryNSteps(steps // 40, start=0.75), validate="raw", name="swa")
        twa = TWA("2%", "25%", lr=rate, validate="raw", name="twa")
        self._fit(rate, steps, seed, [swa])
        module = self._fit(rate, steps, seed, [twa])
        sets = {f"SWA{SHORT}": swa.merged_weights() or {}, f"TWA{SHORT}": twa.merged_weights() or {}}
        return module, sets

    def _free(self, rate: float, seed: int) -> Sets:
        def optimizer(parameters: Any) -> torch.optim.Optimizer:
            return schedulefree.SGDScheduleFree(
                parameters, 10 * rate, momentum=0.9, weight_decay=self.weight_decay, warmup_steps=self.steps // 20
            )

        weights = EvaluationWeights()
        module = self._fit(rate, self.steps, seed, [weights], optimizer=optimizer)
        return module, {"schedule-free SGD": weights.merged_weights() or {}}

    def _fit(
        self,
        rate: float,
        steps: int,
        seed: int,
        callbacks: Sequence[pl.Callback],
        cosine: bool = False,
        optimizer: Callable[[Any], torch.optim.Optimizer] | None = None,
    ) -> Any:
        def sgd(parameters: Any) -> torch.optim.Optimizer:
            return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=self.weight_decay)

        def to_zero(optimizer: torch.optim.Optimizer) -> Any:
            return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5 + 0.5 * math.cos(math.pi * s / steps))

        torch.manual_seed(seed)
        return fit(
            perceptron(),
            InTurn(loader(self._train, self.batch, training=True)),
            optimizer=optimizer or sgd,
            schedule=to_zero if cosine else None,
            steps=steps,
            seed=seed,
            device="cpu",
            callbacks=callbacks,
            val=loader(self._val, 400),
            val_every=steps // 15,
        )


def averages(size: str) -> Averages:
    return Averages() if size == "small" else Averages(steps=15000, rates=(0.02, 0.05, 0.1, 0.2))
