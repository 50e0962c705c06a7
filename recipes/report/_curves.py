"""The figure of a run: the accuracy of each set of weights over optimizer steps."""

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lightning_merge.recipes.report._page import COLOURS, GREY


def curve(points: dict[int, dict[str, float]], metric: str) -> list[tuple[int, float]]:
    """The steps at which a metric was measured, each with its value."""
    return [(step, values[metric]) for step, values in sorted(points.items()) if metric in values]


def curves_figure(
    curves: dict[str, list[tuple[int, float]]],
    windows: dict[str, tuple[int, int] | None],
    accuracy: str,
    steps: int,
) -> Figure:
    """Plots the accuracy of each set over optimizer steps, and the updates of each average."""
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    colours = {"raw": GREY} | {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(windows)}
    for name, points in curves.items():
        if points:
            x, y = zip(*points, strict=True)
            marker = "o" if len(points) == 1 else None
            axes.plot(x, y, color=colours[name], label=name, marker=marker, linewidth=1.2 if name == "raw" else 2)
            axes.annotate(
                f"{y[-1]:.1%}",
                (x[-1], y[-1]),
                xytext=(5, 0),
                textcoords="offset points",
                verticalalignment="center",
                color=colours[name],
                annotation_clip=False,
            )
    for name, window in windows.items():
        if window:
            label = f"{name} takes weights in (steps {window[0]} to {window[1]})"
            axes.axvspan(*window, color=colours[name], alpha=0.12, linewidth=0, label=label)
    axes.set_xlim(0, steps)
    axes.set_ylim(*limits([[value for _, value in points] for points in curves.values() if points]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    axes.set_xlabel("optimizer steps")
    axes.set_ylabel(accuracy)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, borderaxespad=0)
    return figure


def limits(curves: list[list[float]]) -> tuple[float, float]:
    """Axis limits that show the late differences: the lowest fifth of the values may be cut off, the last ones not."""
    values = sorted(value for curve in curves for value in curve)
    low = min(values[len(values) // 5], *(curve[-1] for curve in curves))
    margin = max(0.1 * (values[-1] - low), 0.002)
    return low - margin, min(1 + margin / 4, values[-1] + margin)
