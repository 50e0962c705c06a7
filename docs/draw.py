"""Draws what is merged when, a picture for each family of methods, in docs/pictures: ``python docs/draw.py``.

Shares, branches and sums are computed as the methods do, on a made-up run of 60 steps.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PICTURES = Path(__file__).parent / "pictures"
RAW, MERGED, PALE, BASE = "#5b6ee1", "#e8590c", "#c5cbe3", "#495057"
STYLE = {
    "font.size": 10,
    "font.family": "sans-serif",
    "svg.fonttype": "none",  # text stays text: small, and found by a search in the page
    "svg.hashsalt": "lightning-merge",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": BASE,
    "figure.facecolor": "white",
    "lines.linewidth": 1.8,
}
STEPS = 60
steps = np.arange(1, STEPS + 1)


def rows(titles: Sequence[str], height: float = 0.85) -> tuple[Figure, list[Axes]]:
    """Axes above each other with a title on the left, all over the same steps."""
    figure, axes = plt.subplots(len(titles), sharex=True, figsize=(7, height * len(titles) + 0.6), squeeze=False)
    for axis, title in zip(axes[:, 0], titles, strict=True):
        axis.set_ylabel(title, rotation=0, ha="right", va="center")
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
    axes[-1, 0].set_xlabel("training step")
    axes[-1, 0].set_xticks([0, 20, 40, 60])
    return figure, list(axes[:, 0])


def panels(titles: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Axes side by side, without scales."""
    figure, axes = plt.subplots(1, len(titles), figsize=(2.4 * len(titles), 2.6), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xticks([])
        axis.set_yticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.margins(0.12)
    return figure, list(axes[0])


def shares(axis: Axes, values: np.ndarray) -> None:
    """How much the weights of each step count in the result."""
    seen = values > 0.01 * values.max()
    axis.vlines(steps[seen], 0, values[seen] / values.max(), color=MERGED, linewidth=4.5)
    axis.plot([1, STEPS], [0, 0], color=RAW)
    axis.set_ylim(-0.1, 1.15)


def arrow(axis: Axes, start: Sequence[float], end: Sequence[float], color: str) -> None:
    axis.plot(*zip(start, end, strict=True), alpha=0)  # an arrow alone does not widen the axes
    axis.annotate(
        "", end, start, arrowprops={"arrowstyle": "-|>", "color": color, "lw": 1.6, "shrinkA": 2, "shrinkB": 3}
    )


def point(axis: Axes, at: Sequence[float], text: str, color: str, below: bool = False) -> None:
    axis.plot(*at, "o", color=color, zorder=3)
    axis.annotate(text, at, (0, -14 if below else 8), textcoords="offset points", ha="center", color=color)


# ---- the families


def averages_along_a_run() -> Figure:
    figure, axes = rows(["EMA", "SWA", "LAWA", "SMA", "Anneal", "post-hoc EMA,\nnarrow", "post-hoc EMA,\nwide"])
    ends = steps % 5 == 0
    shares(axes[0], 0.9 ** (STEPS - steps))
    shares(axes[1], 1.0 * (ends & (steps > 45)))
    shares(axes[2], 1.0 * (ends & (steps > 35) & (steps <= 60)))
    shares(axes[3], 1.0 * (steps > 8))
    window = np.clip((steps - 40) / 20, 0, None)
    shares(axes[4], np.diff(np.sqrt(window), prepend=0))  # the shape `1-sqrt`
    shares(axes[5], (steps / STEPS) ** 16.97)
    shares(axes[6], (steps / STEPS) ** 6.94)
    figure.suptitle("How much the weights of a step count in the average", fontsize=10)
    return figure


def averages_chosen_by_a_score() -> Figure:
    figure, axes = rows(["validation\nloss", "SWAD", "BestK", "ASWA", "TWA"])
    random = np.random.default_rng(3)
    loss = 1.2 * np.exp(-steps / 9) + 0.012 * np.maximum(steps - 44, 0) + 0.3 + 0.02 * random.standard_normal(STEPS)
    looks = steps[steps % 5 == 0]
    seen = loss[looks - 1]
    axes[0].plot(steps, loss, color=PALE)
    axes[0].plot(looks, seen, "o", color=BASE, markersize=4)
    valley = looks[seen <= 1.3 * seen.min()]
    shares(axes[1], 1.0 * ((steps >= valley.min()) & (steps <= valley.max())))
    best = looks[np.argsort(seen)[:3]]
    shares(axes[2], 1.0 * np.isin(steps, best))
    taken, lowest = [], np.inf
    for step, each in zip(looks, seen, strict=True):
        if step > 20 and each <= lowest + 0.03:  # a mean is smoother than a single look
            taken.append(step)
            lowest = min(lowest, each)
    shares(axes[3], 1.0 * np.isin(steps, taken))
    trained = np.zeros(STEPS)
    trained[looks[3:] - 1] = [0.2, 0.5, 0.45, 0.9, 0.7, 1.0, 0.6, 0.8, 0.3]
    shares(axes[4], trained)
    figure.suptitle("How much the weights of a step count, and the score that says so", fontsize=10)
    return figure


def after_training() -> Figure:
    figure, axes = panels(
        ["average: one run", "soup: several runs", "combiner: several tasks", "interpolate,\nextrapolate"]
    )
    way = np.array([[0, 0], [0.6, 0.7], [1.3, 0.3], [1.7, 1.0], [2.4, 0.6]])
    axes[0].plot(*way.T, color=PALE)
    axes[0].plot(*way[1:].T, "o", color=RAW)
    point(axes[0], way[1:].mean(0), "mean", MERGED, below=True)
    ends = np.array([[0.2, 1.4], [1.2, 1.8], [2.2, 1.2]])
    for end in ends:
        arrow(axes[1], (1.2, 0), end, PALE)
        axes[1].plot(*end, "o", color=RAW)
    point(axes[1], ends.mean(0), "mean", MERGED, below=True)
    point(axes[1], (1.2, 0), "start", BASE, below=True)
    vectors = np.array([[1.5, 0.3], [0.3, 1.4]])
    for number, vector in enumerate(vectors, 1):
        arrow(axes[2], (0, 0), vector, RAW)
        axes[2].annotate(f"task {number}", vector, (2, 4), textcoords="offset points", color=RAW)
    arrow(axes[2], (0, 0), 0.8 * vectors.sum(0), MERGED)
    axes[2].annotate("merged", 0.8 * vectors.sum(0), (0, 4), textcoords="offset points", ha="center", color=MERGED)
    point(axes[2], (0, 0), "base", BASE, below=True)
    axes[3].plot([0, 2.8], [0, 1.4], color=PALE)
    point(axes[3], (0, 0), "before", BASE, below=True)
    point(axes[3], (1, 0.5), r"$\alpha = 0.5$", MERGED)
    point(axes[3], (2, 1), "after", RAW, below=True)
    point(axes[3], (2.8, 1.4), r"$\alpha = 1.4$", MERGED)
    return figure


def branches() -> Figure:
    titles = [
        "averaged: Lookaround,\nDART, local SGD",
        "pulled: PAPA",
        "shuffled: WASH",
        "outer step: DiLoCo",
        "searched:\nForkMerge",
    ]
    figure, axes = rows(titles, height=1.1)
    mixes: list[Callable[[np.ndarray, np.ndarray], np.ndarray]] = [
        lambda now, _: np.full(3, now.mean()),
        lambda now, _: now + 0.35 * (now.mean() - now),
        lambda now, _: now[[1, 2, 0]],
        lambda now, anchor: np.full(3, anchor.mean() + 1.4 * (now.mean() - anchor.mean())),
        lambda now, _: np.full(3, now @ [0.0, 0.3, 0.7]),
    ]
    for axis, mix in zip(axes, mixes, strict=True):
        random = np.random.default_rng(7)
        now = anchor = np.zeros(3)
        for start in range(0, STEPS, 12):
            way = now + np.cumsum(random.normal([-0.1, 0.06, 0.24], 0.18, (6, 3)), axis=0)
            axis.plot(np.arange(start, start + 13, 2), np.vstack([now, way]), color=RAW, linewidth=1.2)
            now = mix(way[-1], anchor)
            axis.plot([start + 12] * 3, way[-1], "o", color=PALE, markersize=4)
            axis.plot([start + 12] * 3, now, "o", color=MERGED, markersize=5)
            anchor = now
    figure.suptitle("One coordinate of three branches; orange: where they go on after a merge", fontsize=10)
    return figure


def every_update() -> Figure:
    titles = ["update of\nthe optimizer", "earlier\nfine-tuning", "OnDARE", "OnTIES"]
    figure, axes = rows(titles)
    random = np.random.default_rng(5)
    update, earlier, entries = random.standard_normal(20), random.standard_normal(20), np.arange(20)
    kept = random.random((2, 20)) < 0.5
    large = np.array([abs(each) >= np.median(abs(each)) for each in (update, earlier)])
    a, b = update * large[0], earlier * large[1]
    by_sign = np.where(np.sign(a) == np.sign(b), a + b, np.where(abs(a) >= abs(b), a, b))
    for axis, values in zip(axes, (update, earlier, update * kept[0] + earlier * kept[1], by_sign), strict=True):
        axis.bar(entries, values, width=0.7, color=RAW if values is update else BASE if values is earlier else MERGED)
        axis.axhline(0, color=BASE, linewidth=0.6)
        axis.set_ylim(-3, 3)
    axes[-1].set_xlabel("weight")
    axes[-1].set_xticks([])
    figure.suptitle("One step: half of the entries of both are kept, at random or by magnitude and sign", fontsize=10)
    return figure


def tasks_in_turn() -> Figure:
    figure, axes = panels(["from the base", "from the merged model", "from the last task", "anchored"])
    vectors = np.array([[1.2, 0.2], [0.8, 1.0], [-0.2, 1.3]])
    for axis, start in zip(axes[:3], ("base", "merged", "last"), strict=True):
        point(axis, (0, 0), "base", BASE, below=True)
        merged, last = np.zeros(2), np.zeros(2)
        for number, vector in enumerate(vectors, 1):
            begin = {"base": np.zeros(2), "merged": merged, "last": last}[start]
            last = begin + 0.8 * vector
            arrow(axis, begin, last, RAW)
            axis.annotate(str(number), last, (4, 2), textcoords="offset points", color=RAW)
            merged = merged + (last - merged) / number
            axis.plot(*merged, "o", color=MERGED, markersize=4 + 2 * number)
    point(axes[3], (0, 0), "base", BASE, below=True)
    arrow(axes[3], (0, 0), (1.8, 1.0), PALE)
    arrow(axes[3], (0, 0), (1.0, 0.9), MERGED)
    axes[3].annotate("pulled back", (1.0, 0.9), (-6, 8), textcoords="offset points", ha="center", color=MERGED)
    axes[3].annotate("free", (1.8, 1.0), (0, 6), textcoords="offset points", ha="center", color=BASE)
    figure.suptitle("Blue: the tasks' trainings; orange: the merged model after each", fontsize=10)
    return figure


def choose() -> Figure:
    """The five questions of choose.md."""
    questions = [
        ("1  Is the training over?", "files are there: After training"),
        ("2  Do tasks come one after the other?", "Tasks in turn"),
        ("3  Must a tuned model not forget?", "Every update; Interpolate; WARP"),
        ("4  Slow links, or several augmentations?", "Branches"),
        ("5  Is there a score to choose by?", "Averages chosen by a score"),
        ("", "Averages along a run"),
    ]
    figure, axis = plt.subplots(figsize=(7, 4.6))
    axis.axis("off")
    axis.set(xlim=(-0.2, 10.2), ylim=(-5.6, 0.6))
    for row, (question, family) in enumerate(questions):
        for left, width, text, color in ((0, 5.0, question, RAW), (6.2, 3.8, family, MERGED)):
            if text:
                box = FancyBboxPatch((left, -row - 0.3), width, 0.6, boxstyle="round,pad=0.05", ec=color, fc="white")
                axis.add_patch(box)
                axis.text(left + width / 2, -row, text, ha="center", va="center", fontsize=9)
        if question:
            arrow(axis, (5.05, -row), (6.15, -row), BASE)
            axis.text(5.6, -row + 0.12, "yes", ha="center", color=BASE, fontsize=9)
            last = row == len(questions) - 2
            arrow(axis, (2.5, -row - 0.35), (6.15, -row - 1) if last else (2.5, -row - 0.65), BASE)
            axis.text(2.6, -row - 0.5, "no", color=BASE, fontsize=9, va="center")
    return figure


DRAWN = (
    averages_along_a_run,
    averages_chosen_by_a_score,
    after_training,
    branches,
    every_update,
    tasks_in_turn,
    choose,
)


def draw(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    with plt.rc_context(STYLE):
        for picture in DRAWN:
            figure = picture()
            figure.tight_layout()
            figure.savefig(folder / f"{picture.__name__.replace('_', '-')}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    draw(PICTURES)
    print(f"{PICTURES}: {len(DRAWN)} pictures")
