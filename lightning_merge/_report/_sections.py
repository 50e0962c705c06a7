"""The cards on the page of a report: a chart and a table for each metric, and what there is of the averages."""

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Literal

from lightning_merge._choice import mode_by_name
from lightning_merge._report._chart import COLOURS, DASHES, Line, chart, written
from lightning_merge._report._record import Curve, Record

_RAW = "raw"
_HEALTH = {
    "updates": "How often weights were taken in.",
    "distance": "Euclidean distance of the merged parameters from those that train, in the units of the weights.",
    "start_share": "Share of the average that is still the weights it started from.",
    "decay": "Share of the average that an update keeps.",
}


def _card(heading: str, *content: str) -> str:
    return f"<section><h3>{escape(heading)}</h3>{''.join(content)}</section>"


# ---- metrics


def metrics(records: Sequence[Record], group: Literal["measured", "trained"]) -> list[str]:
    """A card for each metric, that of the monitor first."""
    names = dict.fromkeys(metric for record in records for metric in getattr(record, group))
    first = {record.monitor for record in records}
    cards = []
    for metric in sorted(names, key=lambda name: name not in first):
        curves = _of(records, group, metric)
        mode = next((r.mode for r in records if r.monitor == metric and r.mode), None) or mode_by_name(metric)
        cards.append(_card(metric, chart(_lines(records, curves), "step", metric), _table(records, curves, mode)))
    return cards


def _table(
    records: Sequence[Record], curves: Mapping[tuple[int, str], Curve], mode: Literal["min", "max"] | None
) -> str:
    head = {"min": "<th>lowest<th>at step", "max": "<th>highest<th>at step", None: "<th>lowest<th>highest"}[mode]
    bests = {key: curve.best(mode) for key, curve in curves.items()} if mode else {}
    values = [point[1] for point in bests.values() if point is not None]
    top = (min if mode == "min" else max)(values, default=None)
    rows = []
    for (number, of), curve in curves.items():
        last = "" if curve.last is None else written(curve.last[1])
        if mode is None:
            ends = [written(p[1]) if (p := curve.best(each)) is not None else "none" for each in ("min", "max")]
            cells = f"<td>{ends[0]}<td>{ends[1]}"
        elif (best := bests[number, of]) is None:
            cells = "<td>none<td>"
        else:
            cells = f"<td{' class=best' if best[1] == top else ''}>{written(best[1])}<td>{best[0]}"
        rows.append(f"<tr><td>{escape(_label(records, number, of))}<td>{last}{cells}")
    return f"<table><tr><th>weights<th>last{head}{''.join(rows)}</table>"


# ---- averages


def health(records: Sequence[Record]) -> Iterator[str]:
    """A card for each figure that averages log."""
    for key, about in _HEALTH.items():
        curves = _of(records, "health", key)
        if drawn := chart(_lines(records, curves), "step", key, from_=0.0):
            yield _card(key, f"<p class=note>{about}</p>", drawn)


def ages(records: Sequence[Record]) -> Iterator[str]:
    """Weight mass by age."""
    found = {(number, of): age for number, record in enumerate(records) for of, age in record.ages.items()}
    oldest = max((age.ages[-1] for age in found.values()), default=0.0)
    lines, rows = [], []
    for (number, of), age in found.items():
        label = _label(records, number, of)
        points = [(0.0, 0.0), *zip(age.ages, age.mass, strict=True), (oldest, age.mass[-1])]
        lines.append(Line(label, points, *_style(records, number, of)))
        half = next((written(a) for a, mass in points if mass >= 0.5), "never")
        rows.append(f"<tr><td>{escape(label)}<td>{written(age.mean)}<td>{half}<td>{age.start:.1%}")
    if drawn := chart(lines, "age in steps, at most", "share of the average", from_=0.0):
        note = "How much of an average is weights of at most so many steps before its last update."
        table = f"<table><tr><th>average<th>mean age<th>half within<th>start{''.join(rows)}</table>"
        yield _card("weight mass by age", f"<p class=note>{note}</p>", drawn, table)


# ---- what a line is called, and how it is drawn


def _of(
    records: Sequence[Record], group: Literal["measured", "trained", "health"], metric: str
) -> dict[tuple[int, str], Curve]:
    """The curves of a metric by run and set, raw weights first and averages as they are in the Trainer."""
    found: dict[tuple[int, str], Curve] = {}
    for number, record in enumerate(records):
        curves = getattr(record, group).get(metric, {})
        found |= {(number, of): curves[of] for of in (_RAW, *record.about) if of in curves}
    return found


def _lines(records: Sequence[Record], curves: Mapping[tuple[int, str], Curve]) -> list[Line]:
    return [
        Line(_label(records, number, of), curve.drawn(), *_style(records, number, of))
        for (number, of), curve in curves.items()
    ]


def _label(records: Sequence[Record], number: int, of: str) -> str:
    return of if len(records) == 1 else f"{records[number].title}: {of}"


def _style(records: Sequence[Record], number: int, of: str) -> tuple[int | None, int]:
    """Colour and dashes: of one run a colour for each average, of several a colour for each run."""
    sets = list(dict.fromkeys(name for record in records for name in record.about))
    place = sets.index(of) if of in sets else len(sets)
    if len(records) == 1:
        return (None, 0) if of == _RAW else (place, place // COLOURS % DASHES)
    return number, DASHES - 1 if of == _RAW else place % (DASHES - 1)
