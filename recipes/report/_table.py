"""The table of a run and its sentences: what each set of weights measured at the end."""

import math
from pathlib import Path

from rich.table import Table

from lightning_merge.callbacks import Published


def rows_of(
    metrics: tuple[str, ...],
    averages: list[Published],
    final: dict[str, dict[str, float]],
    files: dict[str, str],
    folder: Path,
) -> list[list[str]]:
    """What each set measured, and its file; the raw weights first."""
    found = []
    for name in ("raw", *(average.name for average in averages)):
        values = [f"{final[name][m]:.4f}" if m in final.get(name, {}) else "not measured" for m in metrics]
        found.append([name, *values, files.get(name, "none").replace(f"{folder}/", "")])
    return found


def table(metrics: tuple[str, ...], rows: list[list[str]]) -> Table:
    """The same for a terminal."""
    drawn = Table(title="Weights at the end of the run", title_justify="left")
    for heading in ("weights", *metrics, "file, in the run folder"):
        drawn.add_column(heading, justify="right" if heading in metrics else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    return drawn


def sentence(accuracy: str, average: Published, final: dict[str, dict[str, float]], images: int | None) -> str:
    """Compares raw and merged accuracy in one sentence, with the standard error of the difference."""
    if not average.ready:
        return f"{average.name} merged nothing in this run."
    merged, raw = (final.get(name, {}).get(accuracy) for name in (average.name, "raw"))
    if merged is None:
        return f"{average.name} was not measured: there was no validation."
    if raw is None:
        return (
            f"{average.name} {merged:.2%} {accuracy}. The raw weights were not measured at the end:"
            f" `validate: both` on {average.name} measures them."
        )
    points = 100 * (merged - raw)
    if not images:
        return f"{average.name} {merged:.2%} against raw {raw:.2%} {accuracy}: {points:+.2f} points."
    # Of two independent sets of images; of the same images it is less.
    error = 100 * math.sqrt((merged * (1 - merged) + raw * (1 - raw)) / images)
    if abs(points) < 2 * error or not points:
        verdict = "is not clearly different from raw"
    else:
        verdict = f"is {'better' if points > 0 else 'worse'} than raw"
    return (
        f"{average.name} {verdict}: {merged:.2%} against {raw:.2%} {accuracy}, {points:+.2f} points (standard error"
        f" {error:.2f}), {round((merged - raw) * images):+d} of {images} images."
    )
