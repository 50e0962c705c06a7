"""All combiners on the same fine-tuned models of a pretrained network: what each task keeps of its own accuracy."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from _shared import clock_of, progress
from torch import Tensor, nn

from _evidence._families import families
from _evidence._fit import Part, accuracy, fit, loader
from _evidence._pretrained import Pretrained
from _evidence._protocol import Place, Protocol, Scores
from _evidence._rules import SCALED, Known, copies_of, merged_by, rules
from lightning_merge.callbacks import ImportanceStatistics
from lightning_merge.combiners import EMR, add_vector, task_vector
from lightning_merge.weights import Weights

RELATIVE, ABSOLUTE, SECONDS, COPIES = "relative accuracy", "accuracy", "seconds", "copies of the weights"


class Watch(pl.Callback):
    """What the processor's clock says when its turn comes at the end of training."""

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.at = clock_of(1)()


@dataclass
class Tuned:
    """The models of a seed.

    Attributes:
        module: Whose weights are replaced to measure.
        base: The pretrained network.
        heads: The head of each task, trained on the base and frozen then.
        vectors: What each task added to the base.
        statistics: By kind and task.
        seconds: For the statistics of all tasks, by kind.
    """

    module: pl.LightningModule
    base: Weights
    heads: list[Weights]
    vectors: list[Weights]
    statistics: Known
    seconds: dict[str, float]


@dataclass
class Merging(Protocol):
    """Six tasks, each fine-tuned from the pretrained network with a frozen linear probe as its head; one merge of all.

    Told the task, a merged model is measured with that task's head. Scales are searched alike, on validation images of
    a seed that is not reported. BatchNorm keeps ImageNet's statistics; its weights are merged. Rules of spectra see 1x1
    convolutions as the matrices that they are. Seconds are of one processor, statistics of all tasks included.
    """

    claim = (
        "ViT-B/32, 8 tasks: mean 66 < Fisher 68 < task arithmetic 70 < RegMean 72 ~ TIES 72 < Consensus 75"
        " < TSV-M 84 ~ Iso-C < EMR 89 (told the task) < fine-tuned 91; MaTS above RegMean; MetaGPT above sums"
    )
    beside = "mean"

    images: int = 450
    val_images: int = 100
    test_images: int = 300
    size: int = 96
    frozen: int = 9
    probe_steps: int = 200
    steps: int = 80
    batch: int = 32
    rate: float = 3e-4
    fisher_samples: int = 100
    scales: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.1, 1.5, 2.0)

    def prepare(self, place: Place) -> None:
        self._device = place.device
        self._network = Pretrained(10, self.size, self.frozen, place.device, place.cache)
        self._tasks: dict[str, dict[str, Part]] = {
            name: {part: (self._network.activations(pixels), labels) for part, (pixels, labels) in parts.items()}
            for name, parts in families(place.data, self.images, self.val_images, self.test_images).items()
        }

    def choose(self) -> dict[str, Any]:
        """The scale of each rule that has one, by mean relative accuracy on validation images."""
        tuned = self._tuned(1000)
        own = self._accuracies(tuned, [add_vector(tuned.base, vector) for vector in tuned.vectors], "val")
        found: dict[str, Any] = {}
        for name in SCALED:
            by_scale = {}
            for scale in self.scales:
                rule = rules(tuned.statistics, {name: scale})[name]
                model = add_vector(tuned.base, merged_by(name, rule, tuned.vectors))
                scores = self._accuracies(tuned, [model] * len(own), "val")
                by_scale[scale] = sum(100 * a / b for a, b in zip(scores, own, strict=True)) / len(own)
            found[name] = max(by_scale, key=lambda scale, by=by_scale: by[scale])
            progress(f"{name}: scale {found[name]}")
        return {"scales": found}

    def run(self, seed: int, chosen: Mapping[str, Any]) -> Scores:
        tuned, tasks = self._tuned(seed), list(self._tasks)
        own = self._accuracies(tuned, [add_vector(tuned.base, vector) for vector in tuned.vectors], "test")
        scores = {"base": self._accuracies(tuned, [tuned.base] * len(tasks), "test")}
        found: dict[str, dict[str, float]] = {RELATIVE: {}, ABSOLUTE: {}, **{task: {} for task in tasks}}
        found |= {SECONDS: {}, COPIES: {}}
        for name, rule in rules(tuned.statistics, chosen["scales"]).items():
            began = clock_of(1)()
            vector = merged_by(name, rule, tuned.vectors)
            served = [vector] * len(tasks)
            if isinstance(rule, EMR):
                served = [rule.for_task(each, vector) for each in tuned.vectors]
            statistics = next(iter(getattr(rule, "statistics", {}).values()), None)
            passes = tuned.seconds[statistics.kind] if statistics is not None else 0.0
            found[SECONDS][name] = clock_of(1)() - began + passes
            found[COPIES][name] = copies_of(name, rule, tuned.vectors)
            scores[name] = self._accuracies(tuned, [add_vector(tuned.base, each) for each in served], "test")
        for name, values in {**scores, "own models": own}.items():
            found[ABSOLUTE][name] = sum(values) / len(values)
            for task, value, best in zip(tasks, values, own, strict=True):
                found[task][name] = 100 * value / best
            found[RELATIVE][name] = sum(found[task][name] for task in tasks) / len(tasks)
        return found

    def _accuracies(self, tuned: Tuned, models: list[Weights], part: str) -> list[float]:
        """Of each task with its own head."""
        triples = zip(models, tuned.heads, self._tasks.values(), strict=True)
        return [accuracy(tuned.module, {**model, **head}, t[part], self._device) for model, head, t in triples]

    def _tuned(self, seed: int) -> Tuned:
        heads, vectors, seconds, base = [], [], dict.fromkeys(("fisher", "gram", "adam"), 0.0), {}
        statistics: Known = {kind: {} for kind in seconds}
        for number, (name, parts) in enumerate(self._tasks.items()):
            progress(f"seed {seed}: {name}")
            network = self._network.rest(seed)
            self._probe(network, parts["train"], seed)
            measured, watches = self._measuring(), [Watch() for _ in range(4)]
            base = {f"model.{n}": p.detach().clone() for n, p in network.named_parameters() if p.requires_grad}
            module = fit(
                network,
                loader(parts["train"], self.batch, training=True),
                optimizer=lambda parameters: torch.optim.Adam(parameters, self.rate),
                steps=self.steps,
                seed=10 * seed + number,
                device=self._device,
                callbacks=[each for pair in zip(watches, measured, strict=False) for each in pair] + watches[3:],
            )
            trained = {n: p.detach().cpu() for n, p in module.named_parameters()}
            heads.append({n: p.clone() for n, p in trained.items() if n not in base})
            vectors.append(task_vector({n: trained[n] for n in base}, base))
            for at, each in enumerate(measured):
                statistics[each.kind][number] = each.statistics
                seconds[each.kind] += watches[at + 1].at - watches[at].at
        return Tuned(module, base, heads, vectors, statistics, seconds)

    def _measuring(self) -> list[ImportanceStatistics]:
        few = ImportanceStatistics("fisher", samples=self.fisher_samples)
        return [few, ImportanceStatistics("gram", samples=self.images), ImportanceStatistics("adam")]

    def _probe(self, network: nn.Sequential, part: Part, seed: int) -> None:
        """Trains the head on the base's features, and freezes it."""
        *body, head = network.eval()
        with torch.no_grad():
            features = torch.cat([_through(body, each) for each in part[0].split(100)])
        trained = copy.deepcopy(head)
        batches = loader((features, part[1]), self.batch, training=True)
        fit(
            trained,
            batches,
            optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-3),
            steps=self.probe_steps,
            seed=seed,
            device=self._device,
        )
        head.load_state_dict(trained.state_dict())
        head.requires_grad_(False)


def _through(layers: list[nn.Module], inputs: Tensor) -> Tensor:
    for layer in layers:
        inputs = layer(inputs)
    return inputs


def merging(size: str) -> Merging:
    if size == "small":
        return Merging()
    return Merging(images=2000, size=160, frozen=0, steps=500, rate=1e-4, fisher_samples=1000)
