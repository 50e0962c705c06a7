"""``lightning-merge doctor FILE --widths FOLDER``: which width of a post-hoc average would have been best."""

import csv
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lightning_merge._checks import whole
from lightning_merge._commands._kept import kept_of
from lightning_merge._commands._target import loading, save
from lightning_merge.diagnostics import MOST_POINTS
from lightning_merge.files import atomic, is_remote
from lightning_merge.files._layouts import open_set
from lightning_merge.files._ours import synthesiser
from lightning_merge.rules._power_means import widths_between
from lightning_merge.weights import Weights


def widths(text: str, config: Path, monitor: str, points: int, folder: Path) -> str:
    """Measures widths from the narrowest to the widest that is tracked, and writes the losses and the best weights.

    Args:
        text: ``FILE`` or ``FILE:SET``, a full checkpoint with the state of a ``PostHocEMA``.
        config: Names the model and data that losses are measured with.
        monitor: The loss that validation logs.
        points: Widths between the two, evenly spread in proportion; at least 1.
        folder: Gets ``widths.csv``, ``best.ckpt`` and, where matplotlib is installed, ``widths.png``.

    Raises:
        ValueError: If an argument is out of its range, the file holds no such state, or no loss is a number.
    """
    from lightning_merge._commands._runs import Bench

    whole("points", points, 1, MOST_POINTS)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"`--widths` must be a folder, and {folder} is a file.")
    file, name = open_set(text)
    rule, made = synthesiser(file, name)
    bench = Bench(config)
    losses: dict[float, float] = {}
    kept: dict[float, Weights] = {}  # of the lowest loss so far: what was measured is what is written
    for sigma in widths_between(rule.sigmas, points):
        weights = made(sigma).state_dict
        with torch.random.fork_rng():
            torch.manual_seed(0)  # the same batches for all
            weights |= bench.statistics(weights)
        losses[sigma] = bench.loss(weights, monitor)
        if losses[sigma] == min((each for each in losses.values() if not math.isnan(each)), default=None):
            kept = {sigma: weights}
    if not kept:
        raise ValueError(f"the {monitor} of no width of {name!r} in {file.path} is a number.")
    (best, weights), published = kept.popitem(), max(losses)
    bench.load(weights)
    folder.mkdir(parents=True, exist_ok=True)
    more = {} if is_remote(file.path) else kept_of([Path(file.path)])[0]  # so that Lightning loads it too
    about = {"average": name, "sigma": best, "monitor": monitor, "score": losses[best], "file": str(file.path)}
    save({"state_dict": bench.model.state_dict(), **more, "provenance": about}, folder / "best.ckpt")
    _write(folder / "widths.csv", losses, monitor)
    written = ["best.ckpt", "widths.csv", *_drawn(folder / "widths.png", losses, monitor)]
    found = f"{best:.4g} of the run has the lowest {monitor} of the widths of {name}, {losses[best]:.6g}"
    beside = "it was published" if best == published else f"{published:.4g} was published, with {losses[published]:.6g}"
    edge = " It is the end of what was tracked: try other `sigmas`." if best in (min(losses), published) else ""
    return "\n".join(
        [
            f"{found}; {beside}.{edge}",
            *(f"  {sigma:8.4f}  {loss:.6g}{'  <' if sigma == best else ''}" for sigma, loss in losses.items()),
            f"{folder}: {', '.join(written)}; the data it was chosen on flatter it, so test on other data",
            "  load: " + loading(folder / "best.ckpt", 'torch.load({path}, weights_only=True)["state_dict"]'),
        ]
    )


def _write(path: Path, losses: Mapping[float, float], monitor: str) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("width", monitor), *losses.items()])
    with atomic(path) as file:
        file.write(text.getvalue().encode())


def _drawn(path: Path, losses: Mapping[float, float], monitor: str) -> list[Any]:
    """Draws the losses by width; nothing without matplotlib."""
    try:
        from lightning_merge.recipes.report._page import figure_of_widths
    except ImportError:
        return []
    figure_of_widths(losses, monitor).savefig(path)
    return [path.name]
