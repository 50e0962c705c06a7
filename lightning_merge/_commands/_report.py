"""The reports of several runs as one page."""

from collections.abc import Sequence
from pathlib import Path

from lightning_merge._report._page import NAME, page, read
from lightning_merge._report._record import Record
from lightning_merge.files._write import atomic


def overlay(runs: Sequence[Path], out: Path) -> str:
    """Writes the page and says where it is.

    Args:
        runs: Pages, or folders with pages in or below them.
        out: Where it is written.

    Raises:
        ValueError: If there is no page, one is another file, or ``out`` is one of them.
    """
    pages = list(dict.fromkeys(each for run in runs for each in _pages(run)))
    if out.resolve() in {each.resolve() for each in pages}:
        raise ValueError(f"`--out` must be another file than the reports that are read, got {out}.")
    records: list[Record] = []
    for each, title in zip(pages, _titles(pages), strict=True):
        found = read(each)
        for record in found:
            name = title if len(found) == 1 else record.title
            names = (name, *(f"{name} ({number})" for number in range(2, len(records) + 3)))
            record.title = next(each for each in names if each not in {other.title for other in records})
            records.append(record)
    with atomic(out) as file:
        file.write(page(records).encode())
    return f"{len(records)} runs: {out}"


def _pages(run: Path) -> list[Path]:
    if run.is_file():
        return [run]
    if not (found := sorted(run.rglob(NAME))):
        raise ValueError(
            f"there is no {NAME} in or below {run}: `callbacks.Report()` in a Trainer writes one at the end of a fit; a"
            " recipe takes `--trainer.callbacks+=Report`. A run that was killed has its curves in its checkpoints, and"
            " resumed it writes them all."
        )
    return found


def _titles(pages: Sequence[Path]) -> list[str]:
    """What tells their folders apart."""
    parts = [each.resolve().parent.parts for each in pages]
    while min(map(len, parts)) > 1 and len({each[:1] for each in parts}) == 1:
        parts = [each[1:] for each in parts]
    while min(map(len, parts)) > 1 and len({each[-1:] for each in parts}) == 1:
        parts = [each[:-1] for each in parts]
    return ["/".join(each) if len(pages) > 1 else str(page.parent) for each, page in zip(parts, pages, strict=True)]
