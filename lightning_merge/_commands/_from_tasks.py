"""``soup`` by coefficients of what each file added to a base, by a gradient."""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_merge.search import Found
    from lightning_merge.search._groups import Per
    from lightning_merge.trajectory import Trajectory
    from lightning_merge.weights import Weights


def from_tasks(
    trajectory: "Trajectory", options: argparse.Namespace, bench: Any, hashes: list[str]
) -> "tuple[Weights, Found, dict[str, list[float]], list[str]]":
    """The merge, what was found, by tensor where there are several coefficients, and what there is to say of it.

    Raises:
        ValueError: If something does not fit.
    """
    from lightning_merge._commands._combining import logged
    from lightning_merge._commands._task_vectors import TaskVectors
    from lightning_merge.search import Adam, CrossEntropy, Entropy, Free

    tasks = TaskVectors(options.base, trajectory, bench.model)
    labelled = options.rule == "atlas"
    kind = CrossEntropy if labelled else Entropy
    data = [batches for each in _benches(options, bench) for batches in _loaders(each, labelled, options.seed)]
    bench.model.to(bench.trainer.strategy.root_device)
    score = kind(bench.model, tasks.base, tasks.vectors, data, per=options.per)
    found = logged(
        score,
        len(trajectory),
        Adam(rate=0.1, start=0.0) if labelled else Adam(),
        options,
        space=Free(-10.0, 10.0) if labelled else Free(0.0, 1.0),
        subject=f"{', '.join([tasks.start.sha256(), *hashes])} ",
        per=options.per,
        tensors=score.tensors,
    )
    merged = tasks.as_in_files(score.weights(found.coefficients))
    return merged, found, *of_groups(trajectory, found, score.tensors, options.per)


def of_groups(
    trajectory: "Trajectory", found: "Found", tensors: "tuple[str, ...]", per: "Per"
) -> tuple[dict[str, list[float]], list[str]]:
    """Each tensor's coefficients, and a line for each file on its own; nothing of one coefficient a file."""
    from lightning_merge.search import by_tensor

    if per == "model":
        return {}, []
    count = len(found.coefficients) // len(trajectory)
    lines = [f"a coefficient for each {per} ({count} each): mean, least, largest"]
    for index, checkpoint in enumerate(trajectory):
        own = found.coefficients[index * count : (index + 1) * count]
        lines.append(f"{checkpoint.path}  {sum(own) / count:8.4f} {min(own):8.4f} {max(own):8.4f}")
    return {name: list(own) for name, own in by_tensor(found.coefficients, tensors, per).items()}, lines


def _benches(options: argparse.Namespace, bench: Any) -> list[Any]:
    """What gives the data of each task: that of the model, if no others are named."""
    from lightning_merge._commands._runs import Bench

    return [Bench(config) for config in options.data] if options.data else [bench]


def _loaders(bench: Any, labelled: bool, seed: int) -> list[list[Any]]:
    """The first batches of training data, or of each set of validation data; the same in every call."""
    from itertools import islice

    import torch

    from lightning_merge._commands._runs import quiet

    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        loaders = bench.training_loader() if labelled else bench.validation_loader()
        several = loaders if isinstance(loaders, list | tuple) else [loaders]
        return [list(islice(loader, 64)) for loader in several]
