"""The report of a stream: a table of its figures, the accuracy matrix as a heat map, a curve per task."""

import math
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from rich.console import Console
from rich.table import Table

from lightning_merge.recipes.streams._run import matrix_of

_TITLES = {"accuracy": "among the classes seen", "accuracy_in_task": "told the task"}


def show(record: dict[str, Any], folder: Path, console: Console) -> None:
    """Prints the figures of a record, and draws ``matrix.png`` and ``curves.png`` into the folder."""
    kinds = [kind for kind in _TITLES if kind in record["rows"][0]]
    table = Table(title=f"After {len(record['rows'])} tasks: {record['merging']}", title_justify="left")
    table.add_column("figure")
    for kind in kinds:
        table.add_column(_TITLES[kind] if len(kinds) > 1 else "value", justify="right")
    for name in record["metrics"][kinds[0]]:
        values = [record["metrics"][kind].get(name) for kind in kinds]
        table.add_row(name.replace("_", " "), *("-" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    heat_map(record, kinds).savefig(folder / "matrix.png")
    curves(record, kinds).savefig(folder / "curves.png")
    console.print(f"Folder: {folder}, with stream.json, matrix.png, curves.png and the bank", soft_wrap=True)


def heat_map(record: dict[str, Any], kinds: list[str]) -> Figure:
    """The accuracy on each task (across) after each task (down)."""
    figure, axes = _axes(len(kinds))
    names = [task["task"] for task in record["tasks"]]
    for each, kind in zip(axes, kinds, strict=True):
        matrix = matrix_of(record, kind)
        each.imshow(matrix.numpy(), vmin=0, vmax=1, cmap="viridis")
        for after in range(len(names)):
            for task in range(len(names)):
                value = float(matrix[after, task])
                if not math.isnan(value):
                    colour = "black" if value > 0.6 else "white"
                    each.text(task, after, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
        each.set_xticks(range(len(names)), names, rotation=90)
        each.set_yticks(range(len(names)), names)
        each.set(xlabel="tested on", ylabel="after training", title=f"accuracy in %, {_TITLES[kind]}")
    return figure


def curves(record: dict[str, Any], kinds: list[str]) -> Figure:
    """The accuracy on each task from when it was trained, and the mean over the tasks so far."""
    figure, axes = _axes(len(kinds))
    for each, kind in zip(axes, kinds, strict=True):
        matrix = matrix_of(record, kind)
        rows = len(record["rows"])
        steps = torch.arange(1, rows + 1)
        for task in range(rows):
            each.plot(
                steps[task:], matrix[task:rows, task], marker="o", markersize=3, label=record["tasks"][task]["task"]
            )
        means = [float(matrix[after, : after + 1].mean()) for after in range(rows)]
        each.plot(steps, means, color="black", linewidth=2, label="mean so far")
        each.set(xlabel="tasks trained", ylim=(0, 1.02), title=_TITLES[kind])
        each.xaxis.set_major_locator(MaxNLocator(integer=True))
        each.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        each.grid(alpha=0.25)
        each.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=7, frameon=False)
    return figure


def _axes(count: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(6 * count, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, squeeze=False)[0])
