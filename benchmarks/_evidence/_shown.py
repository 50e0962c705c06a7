"""A table and a figure from a file of results."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def table(result: Mapping[str, Any]) -> str:
    """Each view's contestants, with their means and their paired differences, as text."""
    runs = result["runs"]
    lines = [
        f"{result['protocol']}, {result['size']}, {result['device']}: {len(runs)} seeds, beside {result['beside']}"
    ]
    width = max(len(one) for of_view in result["summary"].values() for one in of_view)
    for view, of_view in result["summary"].items():
        lines.append(f"\n{view}")
        for one, found in of_view.items():
            difference = _text(found["difference"], "+") if "difference" in found else ""
            lines.append(f"  {one:{width}}  {_text(found['score']):>16}  {difference:>16}")
    return "\n".join(lines)


def figure(result: Mapping[str, Any], path: Path) -> None:
    """Draws the views: scores over budgets, or paired differences with their intervals."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lightning-merge"  # so that the same results give the same file
    from matplotlib import pyplot

    views = result["summary"]
    if result["by_budget"]:
        drawn, axes = pyplot.subplots(figsize=(6, 4))
        _over_budgets(axes, views)
    else:
        drawn, many = pyplot.subplots(1, len(views), figsize=(1.5 + 2 * len(views), 3), sharey=True, squeeze=False)
        for axes, view in zip(many[0], views, strict=True):
            _differences(axes, view, views[view], result["beside"])
    drawn.suptitle(f"{result['protocol']}, {len(result['runs'])} seeds", fontsize=9)
    drawn.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, metadata={"Date": None})
    pyplot.close(drawn)


def _over_budgets(axes: Any, views: Mapping[str, Any]) -> None:
    budgets = [float(view.split()[0]) for view in views]
    for one in next(iter(views.values())):
        scores = [views[view][one]["score"] for view in views]
        means, halves = [s["mean"] for s in scores], [s["half_width"] or 0 for s in scores]
        axes.errorbar(budgets, means, halves, label=one, capsize=2, marker="o", markersize=3, linewidth=1)
    axes.set(xscale="log", xlabel="steps", ylabel="test accuracy, %")
    axes.legend(fontsize=8)


def _differences(axes: Any, view: str, of_view: Mapping[str, Any], beside: str) -> None:
    found = {one: each["difference"] for one, each in of_view.items() if "difference" in each}
    means, halves = ([each[key] or 0 for each in found.values()] for key in ("mean", "half_width"))
    axes.errorbar(means, list(found), xerr=halves, fmt="o", capsize=3, markersize=4, color="black")
    axes.axvline(0, color="gray", linewidth=0.8)
    axes.set_title(view, fontsize=8)
    axes.set_xlabel(f"beside {beside}", fontsize=8)
    axes.tick_params(labelsize=8)


def _text(found: Mapping[str, float | None], sign: str = "") -> str:
    half = "" if found["half_width"] is None else f" ± {found['half_width']:.2f}"
    return f"{found['mean']:{sign}.2f}{half}"
