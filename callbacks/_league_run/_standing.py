"""How a set of weights did in a league, and the table of all."""

import math
from collections.abc import Collection, Mapping, Sized
from typing import Any, NamedTuple

from lightning_merge._choice import is_accuracy
from lightning_merge._ranks import several
from lightning_merge.callbacks._lightning._internals import loaders_of
from lightning_merge.callbacks._lightning._metrics import validation_loop
from lightning_merge.callbacks._publication._ledger import RAW


class Standing(NamedTuple):
    """One row of the table of a ``League``."""

    score: float
    """The metric on the final weights; a NaN if it was not measured, as with nothing merged."""
    standard_error: float | None
    """Of a score that is an accuracy: ``sqrt(p (1 - p) / n)`` over the ``n`` validation samples; else ``None``."""
    ms_per_step: float
    """Time of an update alone, in ms, spread over the optimizer steps from one to the next."""
    megabytes: float
    """What it keeps beside the model, in 10^6 bytes."""


def samples(trainer: Any) -> int | None:
    """Number of validation samples, if that is known: one loader with a length, all of it run, in one process.

    Of several processes a metric may be of the samples of one, or of all.
    """
    loaders = loaders_of(validation_loop(trainer))
    limit = trainer.limit_val_batches
    whole = isinstance(limit, float) and limit == 1.0  # the integer 1 is one batch
    if len(loaders) != 1 or not whole or several():
        return None
    sampler, dataset = getattr(loaders[0], "sampler", None), getattr(loaders[0], "dataset", None)
    counted = sampler if isinstance(sampler, Sized) else dataset
    return len(counted) if isinstance(counted, Sized) else None


def standard_error(monitor: str, score: float, n: int | None) -> float | None:
    """Of an accuracy over ``n`` samples.

    Example:
        >>> standard_error("val/acc", 0.9, 100), standard_error("val/loss", 0.9, 100)
        (0.03, None)
    """
    if not n or not is_accuracy(monitor) or not 0 <= score <= 1:
        return None
    return round(math.sqrt(score * (1 - score) / n), 12)


def table(monitor: str, standings: Mapping[str, Standing], n: int | None, unknown: Collection[str] = ()) -> str:
    """The standings as text, and what the columns are.

    Args:
        monitor: The metric.
        standings: By name.
        n: Number of validation samples, if that is known.
        unknown: Names of those that were not measured; another NaN is one that was.
    """
    rows = [("weights", monitor, "standard error", "ms per step", "MB")]
    for name, each in standings.items():
        score = "not measured" if name in unknown else f"{each.score:.4f}"
        error = "" if each.standard_error is None else f"{each.standard_error:.4f}"
        rows.append((name, score, error, f"{each.ms_per_step:.3f}", f"{each.megabytes:.2f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    if any(each.standard_error is not None for each in standings.values()):
        error = f"standard error: of an accuracy over {n} validation samples, of this one run"
    else:
        error = f"no standard error: {monitor} is no accuracy of a known number of samples"
    return "\n".join([*lines, f"({error}; ms per step: an update alone; MB: what a checkpoint stores of it)"])


def verdict(monitor: str, winner: str, standings: Mapping[str, Standing]) -> str:
    """The winner beside the raw weights, with the standard error of the difference where there is one."""
    first, raw = standings[winner], standings[RAW]
    if winner == RAW:
        return f"the raw weights win with {monitor} {raw.score:.4f}"
    said = f"{winner} wins with {monitor} {first.score:.4f}, raw {raw.score:.4f}"
    if first.standard_error is None or raw.standard_error is None:
        return said
    # Of two independent sets of samples; of the same samples it is less.
    error = math.hypot(first.standard_error, raw.standard_error)
    clear = "" if abs(first.score - raw.score) >= 2 * error else "not "
    return f"{said}: {clear}clearly different, the standard error of the difference is at most {error:.4f}"
