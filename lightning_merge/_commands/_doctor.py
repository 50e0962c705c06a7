"""``lightning-merge doctor``: whether sets of weights can be merged."""

from collections.abc import Sequence
from pathlib import Path

from lightning_merge._mergeable import carried
from lightning_merge.diagnostics import examine
from lightning_merge.files._layouts import open_file, open_set
from lightning_merge.files._refusals import refuse_no_plain
from lightning_merge.files._sets import StoredSet, WeightFile, match
from lightning_merge.weights import is_averaged


def doctor(
    files: list[str], base: str | None, config: Path | None, monitor: str, points: int, statistics: Sequence[str] = ()
) -> str:
    """A report with the verdict first.

    Args:
        files: ``FILE`` or ``FILE:SET``; of a single file all its sets are looked at.
        base: The checkpoint that all were fine-tuned from.
        config: Names the model and data that losses are measured with.
        monitor: The loss that validation logs.
        points: Points between two sets.
        statistics: Files of statistics, one for each set in their order.

    Raises:
        ValueError: If a file cannot be read, files are of different models, or validation logs no such loss.
    """
    chosen = _sets(files)
    opened = list(chosen.values())
    for file, stored in opened:
        refuse_no_plain(file.path, stored.weights)
    for file, stored in opened[1:]:
        match(opened[0][0], opened[0][1].weights, file, stored.weights)
    for name, tensor in opened[0][1].weights.items():
        if not is_averaged(tensor):
            carried(name, [stored.weights[name] for _, stored in opened])  # what no command merges is said here too
    if statistics and len(statistics) != len(chosen):
        raise ValueError(f"`--statistics` takes a file for each of {len(chosen)} sets, got {len(statistics)}.")
    known = dict(zip(chosen, statistics, strict=False))
    candidates = {name: stored.weights for name, (_, stored) in chosen.items()}
    shares = {name: s.initial_share for name, (_, s) in chosen.items() if s.initial_share is not None}
    base_weights = None
    if base is not None:
        file, name = open_set(base)
        base_weights = file.choose(name).weights
        refuse_no_plain(base, base_weights)
        match(opened[0][0], opened[0][1].weights, file, base_weights)
    if config is None:
        result = examine(candidates, base_weights, initial_shares=shares, points=points, statistics=known)
    else:
        from lightning_merge._commands._runs import Bench

        bench = Bench(config)

        result = examine(
            candidates,
            base_weights,
            loss=lambda weights: bench.loss(weights, monitor),
            measure_statistics=bench.statistics,
            initial_shares=shares,
            points=points,
            statistics=known,
        )
    skipped = "  not looked for: barriers of the loss, stale BatchNorm statistics. `--config FILE` measures them."
    return result.report() + ("" if config is not None else f"\n{skipped}")


def _sets(files: list[str]) -> dict[str, tuple[WeightFile, StoredSet]]:
    """Sets by a short name that is unique."""
    if len(files) == 1 and Path(files[0]).exists():
        file = open_file(files[0])
        return {name: (file, stored) for name, stored in file.sets.items()}
    chosen: dict[str, tuple[WeightFile, StoredSet]] = {}
    for text in files:
        file, name = open_set(text)
        short = file.name if sum(open_name(other) == file.name for other in files) == 1 else str(file.path)
        key = short if name == file.default else f"{short}:{name}"
        while key in chosen:  # the same file twice is what an examination finds
            key += "'"
        chosen[key] = (file, file.choose(name))
    return chosen


def open_name(text: str) -> str:
    """The name of the file in ``FILE`` or ``FILE:SET``."""
    return Path(text if Path(text).exists() else text.rpartition(":")[0]).name
