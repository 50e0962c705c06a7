"""The report of a run as one HTML file that needs nothing else."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_merge.diagnostics import Examination

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers (Okabe and Ito, 2008)
GREY = "#7f7f7f"

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.5rem; }
table { border-collapse: collapse; } th, td { padding: .3rem .9rem; border-bottom: 1px solid #8884; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
img { max-width: 100%; background: white; border-radius: 4px; }
.good { color: #009e73; font-weight: 600; } .bad { color: #d55e00; font-weight: 600; }
p.note { color: #888; } code { font-size: .9em; }
"""


def page(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    sentences: Sequence[str],
    sections: Sequence[tuple[str, str]],
) -> str:
    """Renders the whole page.

    Args:
        title: Its heading.
        columns: Headings of the table.
        rows: Its cells; the first and the last are text, those between are numbers.
        sentences: Below the table.
        sections: Heading and HTML of what follows.
    """
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{' class=number' if 0 < place < len(row) - 1 else ''}>{escape(cell)}</td>"
            for place, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    rest = "".join(f"<h2>{escape(heading)}</h2>\n{html}\n" for heading, html in sections)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>\n"
        + "".join(f"<p>{escape(sentence)}</p>\n" for sentence in sentences)
        + rest
        + "</body></html>\n"
    )


def image(figure: Figure, description: str) -> str:
    """Embeds a figure in the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def picture(path: Path, description: str) -> str:
    """Embeds a PNG file in the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{data}">'


def examination(name: str, found: Examination) -> str:
    """A verdict with the figures behind it, and the loss on the line."""
    kind = "bad" if found.findings else "good"
    parts = [f'<p>{escape(name)}: <span class="{kind}">{escape(found.verdict)}</span></p>']
    parts += [f"<p>{escape(finding.text)}</p>" for finding in found.findings]
    if found.line:
        parts.append(image(_line(name, found.line), f"loss between the raw weights and {name}"))
    cells = "".join(
        f"<tr><td>{escape(key)}</td><td class=number>{value:.4g}</td></tr>" for key, value in found.measures.items()
    )
    return "\n".join([*parts, f"<table>{cells}</table>"])


def widths(name: str, losses: Mapping[float, float]) -> str:
    """The loss of an average by its width, and which would have been best."""
    note = "<p class=note>Chosen on the very samples that it was measured on: expect a little less on others.</p>"
    return f"{image(figure_of_widths(losses), f'loss of {name} by its width')}\n{note}"


def figure_of_widths(losses: Mapping[float, float], metric: str = "loss") -> Figure:
    """A curve of the losses, with the lowest and the width that was published."""
    figure, axes = _axes()
    shares = [100 * sigma for sigma in losses]
    axes.plot(shares, list(losses.values()), marker="o", color=COLOURS[0], label="measured")
    known = {loss: 100 * sigma for sigma, loss in losses.items() if not math.isnan(loss)}
    if known:
        low = min(known)
        axes.plot(known[low], low, marker="*", markersize=16, color=COLOURS[1], ls="", label="lowest")
    axes.axvline(max(shares), color=GREY, linestyle=":", label="published")
    axes.set_xscale("log")
    some = shares[:: math.ceil(len(shares) / 8)]
    axes.set_xticks(some, [f"{share:.3g} %" for share in some], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("width, as a share of the run")
    axes.set_ylabel(metric)
    axes.legend(frameon=False)
    return figure


def trajectory(path: Tensor, placed: Mapping[str, Tensor], held: float) -> str:
    """The run in the plane of its two principal components, with the averages on it."""
    figure, axes = _axes()
    axes.plot(path[:, 0], path[:, 1], color=GREY, linewidth=1, marker=".", markersize=3, label="raw")
    for text, (x, y) in (("start", path[0].tolist()), ("end", path[-1].tolist())):
        axes.annotate(text, (x, y), xytext=(6, -14), textcoords="offset points", color=GREY)
    for index, (name, point) in enumerate(placed.items()):
        axes.plot(*point.tolist(), marker="*", markersize=14, color=COLOURS[index % len(COLOURS)], label=name, ls="")
    axes.set_xlabel("first principal component")
    axes.set_ylabel("second")
    axes.legend(frameon=False)
    note = f"<p class=note>The plane holds {held:.0%} of the variance of {len(path)} points of the run, in a sample of"
    return image(figure, "the run in weight space") + f"\n{note} the weights' coordinates.</p>"


def _line(name: str, line: Mapping[float, float]) -> Figure:
    figure, axes = _axes()
    axes.plot([100 * share for share in line], list(line.values()), marker="o", color=COLOURS[0])
    axes.plot([0, 100], [line[0.0], line[1.0]], color=GREY, linestyle=":", linewidth=1)
    axes.set_xlabel(f"share of the way from raw (0 %) to {name} (100 %)")
    axes.set_ylabel("loss")
    return figure


def _axes() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
