"""A figure of the share of each branch in every merge of a run."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lightning_merge.recipes.report._page import COLOURS, GREY


def shares_figure(history: Sequence[Mapping[str, Any]]) -> Figure:
    """Draws a bar per merge, divided into the shares of the branches, above the score of the chosen mixture.

    Args:
        history: Of ``ForkMerge``; at least one merge.
    """
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, sharex=True, height_ratios=(2, 1))
    numbers = list(range(1, len(history) + 1))
    bottom = [0.0] * len(history)
    for place, branch in enumerate(history[0]["shares"]):
        shares = [row["shares"][branch] for row in history]
        above.bar(numbers, shares, bottom=bottom, width=0.85, color=COLOURS[place % len(COLOURS)], label=branch)
        bottom = [under + share for under, share in zip(bottom, shares, strict=True)]
    if kept := [number for number, row in zip(numbers, history, strict=True) if row["previous"]]:
        above.bar(kept, 1.0, width=0.85, color="none", edgecolor=GREY, hatch="//", label="the last merge was kept")
    above.set_ylim(0, 1)
    above.yaxis.set_major_formatter(PercentFormatter(1.0))
    above.set_ylabel("share")
    above.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, borderaxespad=0)
    below.plot(numbers, [row["score"] for row in history], color=GREY, marker="o", markersize=3)
    below.set_xlim(0.5, len(history) + 0.5)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    below.set_xlabel("merge")
    below.set_ylabel("score")
    below.grid(alpha=0.25)
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
