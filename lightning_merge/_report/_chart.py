"""Line charts as SVG, drawn so that a phone shows them one to one."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import final

_WIDTH, _HEIGHT = 400, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 8, 36
COLOURS = 6
"""How many colours there are: the classes ``c0`` to ``c5`` of the page's style; ``raw`` is grey."""

_PATTERNS = ("", "7 3", "9 3 2 3", "14 3", "6 2 1 2 1 2", "2 3")
DASHES = len(_PATTERNS)
"""How many ways there are to dash a line."""


@final
@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        label: For the legend.
        points: In the order of ``x``; what is not finite makes a gap.
        colour: Which colour, or ``None`` for grey.
        dash: How it is dashed, from 0, a full line, to ``DASHES - 1``.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: int | None
    dash: int = 0

    @property
    def style(self) -> str:
        """Attributes of a line."""
        name = "raw" if self.colour is None else f"c{self.colour % COLOURS}"
        dash = _PATTERNS[self.dash]
        return f'class="{name}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def chart(lines: Sequence[Line], x: str, y: str, from_: float = 0.1) -> str:
    """A figure with axes and a legend; empty without a finite point.

    Args:
        lines: What is drawn.
        x: What the horizontal axis counts.
        y: What the vertical one does.
        from_: What only the first part of a line reaches, so long, may lie above or below the picture, which shows late
            differences; 0 to show everything.
    """
    lines = [line for line in lines if any(map(_is_finite, line.points))]
    if not lines:
        return ""
    across = _Axis(*_horizontal(lines), _LEFT, _WIDTH - _RIGHT)
    up = _Axis(*_vertical(lines, from_), _HEIGHT - _BOTTOM, _TOP)
    inner = f'x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _LEFT - _RIGHT}" height="{_HEIGHT - _TOP - _BOTTOM}"'
    box = f"{_LEFT} {_TOP} {_WIDTH - _LEFT - _RIGHT} {_HEIGHT - _TOP - _BOTTOM}"
    drawn = "".join(shape for line in lines for shape in _drawn(line, across, up))
    legend = "".join(f"<li>{_swatch(line)}{escape(line.label)}</li>" for line in lines)
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(f"{y} by {x}")}">'
        f'{_grid(across, up)}<svg {inner} viewBox="{box}">{drawn}</svg>'
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(x)}</text></svg>'
        f"<ul class=legend>{legend}</ul></figure>"
    )


@final
@dataclass(frozen=True)
class _Axis:
    """Maps ``[low, high]`` to ``[first, last]`` of the picture."""

    low: float
    high: float
    first: float
    last: float

    def at(self, value: float) -> float:
        # Far beyond the picture a browser computes no better than it has to.
        place = (value - self.low) / (self.high - self.low)
        return self.first + min(max(place, -9.0), 9.0) * (self.last - self.first)

    def ticks(self, most: int) -> list[tuple[float, str]]:
        """Round numbers, with at most so many gaps between them, and how they are written."""
        rough = (self.high - self.low) / most
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= 0.999 * rough)
        first = math.ceil(self.low / step - 1e-9)
        values = [n * step for n in range(first, math.floor(self.high / step + 1e-9) + 1)]
        digits = max(0, -math.floor(math.log10(step) + 1e-9))
        return [(x, f"{x:.{digits}f}" if digits < 6 and abs(x) < 1e4 else written(x)) for x in values]


def written(value: float) -> str:
    """A number in at most seven characters or so, as a tick or in a table.

    Example:
        >>> [written(x) for x in (0.93214, 12.0, 25_000, 3_200_000, 1e-7, float("nan"))]
        ['0.9321', '12', '25k', '3.2M', '1e-07', 'nan']
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size <= abs(value) < math.inf:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"


def _horizontal(lines: Sequence[Line]) -> tuple[float, float]:
    values = [x for line in lines for x, y in line.points if math.isfinite(y)]
    return min(values), max(values) if max(values) > min(values) else min(values) + 1


def _vertical(lines: Sequence[Line], from_: float) -> tuple[float, float]:
    chosen: list[float] = []
    for line in lines:
        points = [point for point in line.points if _is_finite(point)]
        start = points[0][0] + from_ * (points[-1][0] - points[0][0])
        chosen += [y for x, y in points if x >= start]
    low, high = min(chosen), max(chosen)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def _grid(across: _Axis, up: _Axis) -> str:
    parts = []
    for value, label in up.ticks(7):
        y = up.at(value)
        parts.append(f'<path class=grid d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    for value, label in across.ticks(5):
        x = across.at(value)
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 15}" text-anchor="middle">{label}</text>')
    return "".join(parts)


def _drawn(line: Line, across: _Axis, up: _Axis) -> Iterator[str]:
    """A path for each stretch of finite points, a dot for a single one."""
    for stretch in _stretches(line.points):
        places = [f"{across.at(x):.1f} {up.at(y):.1f}" for x, y in stretch]
        if len(places) == 1:
            cx, cy = places[0].split()
            yield f'<circle {line.style.partition(" stroke")[0]} cx="{cx}" cy="{cy}" r="3"/>'
        else:
            yield f'<path {line.style} d="M{"L".join(places)}"/>'


def _stretches(points: Sequence[tuple[float, float]]) -> Iterator[list[tuple[float, float]]]:
    stretch: list[tuple[float, float]] = []
    for point in points:
        if _is_finite(point):
            stretch.append(point)
        elif stretch:
            yield stretch
            stretch = []
    if stretch:
        yield stretch


def _is_finite(point: tuple[float, float]) -> bool:
    return abs(point[1]) < 1e300  # of what is larger, axes would overflow


def _swatch(line: Line) -> str:
    return f'<svg class=swatch viewBox="0 0 26 8"><path {line.style} d="M0 4H26"/></svg>'
