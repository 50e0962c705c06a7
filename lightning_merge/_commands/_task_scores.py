"""What coefficients of task vectors are searched by: a loss on batches, or metrics that validation logs."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_merge._commands._task_vectors import TaskVectors
    from lightning_merge.search import Coefficients, Entropy, Measured, Method, Score, Space
    from lightning_merge.weights import Weights


@dataclass(frozen=True)
class Plan:
    """A search: the score, how candidates are chosen, and the weights of one."""

    score: "Score"
    method: "Method"
    space: "Space"
    tensors: tuple[str, ...]
    weights: "Callable[[Sequence[float]], Weights]"


def by_gradient(tasks: "TaskVectors", options: argparse.Namespace, bench: Any) -> Plan:
    """Downhill on the entropy of validation inputs, or on the cross entropy of a few training batches."""
    from lightning_merge.search import Adam, CrossEntropy, Entropy, Free

    labelled = options.rule == "atlas"
    kind = CrossEntropy if labelled else Entropy
    data = [batches for each in benches_of(options, bench) for batches in _loaders(each, labelled, options.seed)]
    bench.model.to(bench.trainer.strategy.root_device)
    score = kind(bench.model, tasks.base, tasks.vectors, data, per=options.per)
    if isinstance(score, Entropy) and options.rule == "concrete":
        mask = _mask(score, options)
        masked = [{name: v * mask[name] if name in mask else v for name, v in own.items()} for own in tasks.vectors]
        score = Entropy(bench.model, tasks.base, masked, data, per=options.per)
    method = Adam(rate=0.1, start=0.0) if labelled else Adam()
    space = Free(-10.0, 10.0) if labelled else Free(0.0, 1.0)
    return Plan(score, method, space, score.tensors, score.weights)


def _mask(score: "Entropy", options: argparse.Namespace) -> "Weights":
    """The first half of Concrete AdaMerging, with a file of its state beside the log."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    from lightning_merge.search import concrete_mask

    log = Path(options.log or Path(options.out).with_suffix(".search.jsonl")).with_suffix(".mask.pt")
    with tqdm(total=options.budget, desc="concrete: mask", unit="step") as bar:

        def show(step: int, loss: float) -> None:
            bar.n = step
            bar.set_postfix_str(f"entropy {loss:.4g}")

        return concrete_mask(
            score,
            [0.3] * score.merged_module.count,
            options.budget,
            inner_rate=1.0,
            seed=options.seed % 2**32,
            log=log,
            on_step=show,
        )


def by_metric(tasks: "TaskVectors", options: argparse.Namespace, bench: Any) -> Plan:
    """The mean over tasks of a metric of each, by quadratic models of them or by an evolution."""
    from lightning_merge._commands._combining import measured, monitored
    from lightning_merge.search import CMAES, MAP, Free, Measured
    from lightning_merge.search._merged_module import MergedModule

    merged = MergedModule(bench.model, tasks.base, tasks.vectors, options.per)
    benches = benches_of(options, bench)

    def score(coefficients: "Coefficients") -> "Measured":
        weights = measured(bench, merged.weights(coefficients), options.seed)
        parts = tuple(monitored(each, weights, options.monitor, options.seed) for each in benches)
        return Measured(sum(parts) / len(parts), parts=parts)

    points = max(1, options.budget // 4)
    method = MAP(max(3, options.budget - points), points) if options.rule == "map" else CMAES()
    return Plan(score, method, Free(0.0, 1.0), merged.tensors, merged.weights)


def benches_of(options: argparse.Namespace, bench: Any) -> list[Any]:
    """What gives the data of each task: that of the model, if no others are named."""
    from lightning_merge._commands._runs import Bench

    return [Bench(config) for config in options.data] if options.data else [bench]


def _loaders(bench: Any, labelled: bool, seed: int) -> list[list[Any]]:
    """The first batches of training data, or of each set of validation data, as steps get them; always the same."""
    from itertools import islice

    from lightning.pytorch.utilities import CombinedLoader

    from lightning_merge._commands._drawing import drawing
    from lightning_merge._commands._runs import quiet
    from lightning_merge.callbacks._lightning._user_step import transferred

    bench.set_up()
    with drawing(seed), quiet():
        loaders = bench.training_loader() if labelled else bench.validation_loader()
        several = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders, "sequential")
        return [
            [transferred(bench.trainer, bench.model, batch, number) for batch in islice(loader, 64)]
            for number, loader in enumerate(several.flattened)
        ]
