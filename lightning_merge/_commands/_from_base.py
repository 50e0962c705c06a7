"""``soup`` by what each file added to a base."""

import argparse
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_merge.combiners import Combiner
    from lightning_merge.trajectory import Checkpoint, Trajectory
    from lightning_merge.weights import Weights


def from_base(trajectory: "Trajectory", options: argparse.Namespace) -> "tuple[Weights, list[str]]":
    """The base and what a combiner makes of the files' vectors, a tensor at a time if it can: then little more than the
    result is in memory. And what there is to say of it.

    Raises:
        ValueError: If something does not fit.
    """
    from lightning_merge import combiners
    from lightning_merge._mergeable import carried
    from lightning_merge.trajectory import Checkpoint, Trajectory
    from lightning_merge.weights import is_averaged

    combiner = combiner_of(options)
    start = Checkpoint(options.base)
    Trajectory([start, *trajectory])  # refuses another model
    merged: Weights = {}
    names, first = [], _first_names([start, *trajectory])
    for name in start.places:
        if first[name] != name:
            continue
        if is_averaged(tensor := start.tensor(name)):
            merged[name] = tensor
            names.append(name)
        else:
            merged[name] = carried(name, (checkpoint.tensor(name) for checkpoint in trajectory), trajectory.differing)
    measured = [name for name in names if name.endswith(("running_mean", "running_var"))]
    added = [name for name in names if name not in measured]
    parts = [(combiner, added)] if combiner.locality == "model" else [(combiner, [name]) for name in added]
    # Statistics of BatchNorm are a mean whatever the rule: a sum of differences may make a variance negative.
    for how, together in [*parts, (combiners.Average(), measured)]:
        base = {name: merged[name] for name in together}
        if base:
            merged |= combiners.add_vector(base, how.combine(_vectors(trajectory, options, combiner, base)))
    return {**{name: merged[first[name]] for name in start.places}, **trajectory[-1].extra}, _remarks(combiner, names)


def _first_names(checkpoints: "list[Checkpoint]") -> dict[str, str]:
    """Of each name the first that leads to the same numbers in every file: tied tensors are merged and count once."""
    found: dict[Any, str] = {}
    places = {name: tuple(each.places[name] for each in checkpoints) for name in checkpoints[0].places}
    return {name: found.setdefault(place, name) for name, place in places.items()}


def combiner_of(options: argparse.Namespace) -> "Combiner":
    """The combiner that ``--rule`` names."""
    from lightning_merge import combiners

    known: Any = {index: str(file) for index, file in enumerate(options.statistics or ())}
    rules: dict[str, Callable[[], Combiner]] = {
        "model-stock": combiners.ModelStock,
        "iso-c": combiners.IsoC,
        "tsv-m": combiners.TSVM,
        "tall": combiners.Consensus,
        "metagpt": combiners.MetaGPT,
        "fisher": lambda: combiners.Fisher(known),
        "fisher-nodes": lambda: combiners.Fisher(known, per="node"),
        "daheim": lambda: combiners.Daheim(known, options.base_statistics and str(options.base_statistics)),
        "regmean": lambda: combiners.RegMean(known),
        "mats": lambda: combiners.MaTS(known),
    }
    combiner = rules[options.rule]()
    return combiner if options.scale is None else combiner.with_scale(options.scale)


def _vectors(
    trajectory: "Trajectory", options: argparse.Namespace, combiner: "Combiner", base: "Weights"
) -> "Iterator[Weights]":
    from lightning_merge.combiners import task_vector
    from lightning_merge.combiners._with_statistics import WithStatistics
    from lightning_merge.weights import nonfinite

    for index, each in enumerate(trajectory):
        own = {name: each.tensor(name) for name in base}
        try:
            vector = task_vector(own, base)
        except ValueError as error:
            for path, weights in ((options.base, base), (each.path, own)):
                if damaged := nonfinite(weights):
                    name = next(name for name in weights if name in damaged)
                    raise ValueError(f"`{name}` of {path} holds a NaN or an infinity. Leave that file out.") from error
            raise ValueError(f"{each.path}: {error}") from error
        if isinstance(combiner, WithStatistics):
            combiner.refuse_other_base(base, str(options.base))
            combiner.refuse_other_weights(index, own, str(each.path))
        yield vector


def _remarks(combiner: "Combiner", names: list[str]) -> list[str]:
    from lightning_merge.combiners._with_statistics import WithStatistics

    if not isinstance(combiner, WithStatistics):
        return []
    lines = [f"weighed by {each.summary}" for each in combiner.statistics.values()]
    if without := combiner.without(names):
        some = ", ".join(without[:8]) + (", ..." if len(without) > 8 else "")
        lines.append(f"without statistics, so the plain mean: {some} ({len(without)} in all)")
    return lines
