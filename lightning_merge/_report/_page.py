"""The page: one file that needs nothing but a browser, and holds what it shows to be read again."""

import json
import math
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lightning_merge._report._record import Record
from lightning_merge._report._sections import ages, health, metrics
from lightning_merge._report._style import STYLE

NAME = "merge-report.html"
"""What it is called in a run's folder."""


def page(records: Sequence[Record]) -> str:
    """A page on a run, or on several over each other.

    Args:
        records: At least one; of several the titles differ.
    """
    first = records[0]
    heading = first.title if len(records) == 1 else f"{len(records)} runs"
    parts = [f"<h1>{escape(heading)}</h1>"]
    for record in records:
        lead = "" if len(records) == 1 else f"{record.title}: "
        parts += [f"<p>{escape(lead + note)}</p>" for note in record.notes]
        parts += [f"<p class=note>{escape(f'{lead}{name}: {about}')}</p>" for name, about in record.about.items()]
    sections = [
        *_section("Measured in validation", metrics(records, "measured")),
        *_section("How the averages stand", [*health(records), *ages(records)]),
        *_section("While training", metrics(records, "trained")),
    ]
    parts += sections or ["<p>Nothing was logged.</p>"]
    content = json.dumps([_finite(record.plain()) for record in records]).replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(heading)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + f'\n<script type="application/json" id="runs">{content}</script>\n</body></html>\n'
    )


def read(path: Path) -> list[Record]:
    """The runs of a page that ``page`` made.

    Raises:
        ValueError: If it is another file.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    found = re.search(r'<script type="application/json" id="runs">(.*?)</script>', text)
    try:
        return [Record.of(each) for each in json.loads(found[1] if found else "")]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no report: `callbacks.Report()` writes one to the folder of a run, {NAME}."
        ) from error


def _finite(nested: Any) -> Any:
    """With words for the numbers that JSON does not have."""
    if isinstance(nested, Mapping):
        return {key: _finite(value) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return [_finite(value) for value in nested]
    return str(nested) if isinstance(nested, float) and not math.isfinite(nested) else nested


def _section(heading: str, charts: Sequence[str]) -> list[str]:
    return [f"<h2>{heading}</h2>", f"<div class=charts>{''.join(charts)}</div>"] if charts else []
