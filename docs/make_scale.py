"""Makes the tables of ``scale.md`` from ``benchmarks/_scale.py`` and what was counted: ``python docs/make_scale.py``.

A test holds the page against it.
"""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import _scale as scale  # noqa: E402
from _scale import DEVICES, MOMENTS, SIZES, TRAINING, Cost, Machine  # noqa: E402

PAGE = ROOT / "docs" / "scale.md"
COUNTS = ROOT / "benchmarks" / "results" / "scale.json"
MACHINE = Machine()
BETWEEN_SITES = Machine(link=1.25e9)
BRANCHES = (2, 8, 64)


def _bytes(value: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.0f} B"


def _time(seconds: float) -> str:
    units = (("h", 3600, 7200), ("min", 60, 120), ("s", 1, 1), ("ms", 1e-3, 1e-3), ("µs", 1e-6, 0))
    unit, size = next((unit, size) for unit, size, least in units if seconds >= least)
    number = seconds / size
    return f"{number:.0f} {unit}" if number >= 10 else f"{number:.2g} {unit}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _room(held: float) -> bool:
    return held <= MACHINE.usable * MACHINE.memory


def _by_devices(cost: Callable[[float, int], Cost], cell: Callable[[Cost], str]) -> str:
    """A table over sizes and devices, of what is sharded."""
    rows = []
    for size, n in SIZES.items():
        row = [size]
        for d in DEVICES:
            found = cost(n, d)
            alone, with_it = _room(TRAINING * n / d), _room(TRAINING * n / d + found.device)
            row.append(cell(found) if with_it else "**no**" if alone else "-")
        rows.append(row)
    return _table(["parameters", *(f"{d:,} devices" for d in DEVICES)], rows)


def sharded() -> str:
    """The tables of what is sharded."""

    def both(cost: Cost) -> str:
        return f"{_bytes(cost.device)}, {_time(cost.seconds(MACHINE))}"

    def seconds(cost: Cost) -> str:
        return _time(cost.seconds(MACHINE))

    def file(cost: Cost) -> str:
        return f"{_bytes(cost.file)}, {seconds(cost)}"

    parts = {
        "An average: held, an update": (scale.average, both),
        "Merged weights in place for a validation, and back: held meanwhile, seconds": (scale.swap, both),
        "A window of five: held, an update": (scale.window, both),
        "BatchNorm statistics again, 100 batches of 4096 tokens a device: seconds": (scale.recalibration, seconds),
        "A checkpoint in parts, with moments and one average, or a resume from it: bytes of a process, seconds": (
            scale.save_parts,
            file,
        ),
    }
    return "\n\n".join(f"**{title}**\n\n{_by_devices(*part)}" for title, part in parts.items())


def branches() -> str:
    """What branches hold and send."""
    rows = []
    for size, n in SIZES.items():
        plain, late = scale.diloco(n, 8), scale.streaming(n, 8)
        held = [scale.in_turn(n, 2).device, scale.per_process(n, 8).device, plain.device, late.device]
        cells = [_bytes(each) if _room(TRAINING * n + each) else f"**no** ({_bytes(each)})" for each in held]
        rows.append([size, _bytes(TRAINING * n), *cells, _bytes(late.host)])
    head = [
        "parameters",
        "training alone",
        "two in turn",
        "a mean of processes",
        "DiLoCo",
        "streaming",
        "host, of DiLoCo",
    ]
    rows_sent = []
    for size, n in SIZES.items():
        for k in BRANCHES:
            costs = (scale.per_process(n, k), scale.streaming(n, k))
            row = [f"{size}, {k} branches"]
            for cost in costs:
                near, far = (_time(cost.sent / each.link) for each in (MACHINE, BETWEEN_SITES))
                row.append(f"{_bytes(cost.sent)}: {near}, {far}")
            rows_sent.append([*row, _bytes(scale.save_branches(n, k).host)])
    sent_head = ["", "a mean or an outer step of all", "a fragment, 8 bits", "first process, when a file is written"]
    return f"{_table(head, rows)}\n\n{_table(sent_head, rows_sent)}"


def merging() -> str:
    rows = []
    for size, n in SIZES.items():
        costs = (scale.merge_folders(n, p) for p in (1, 8, 64))
        rows.append([size, *(f"{_bytes(cost.file)}, {_time(cost.seconds(MACHINE))}" for cost in costs)])
    return _table(["parameters", "1 process", "8 processes", "64 processes"], rows)


def _largest(per_number: float, room: float) -> str:
    billions = room / per_number / 1e9
    return f"{billions:.3g} B" if billions < 1000 else f"{billions / 1000:.3g} T"


def limits() -> str:
    """The largest model of each kind of method, and what stops it."""
    room, unit = MACHINE.usable * MACHINE.memory, 1e9

    def of_devices(cost: Callable[[float, int], Cost]) -> str:
        return ", ".join(_largest(TRAINING / d + cost(unit, d).device / unit, room) for d in (8, 4096))

    def each(cost: Cost) -> str:
        return _largest(TRAINING + cost.device / unit, room)

    rows = [
        ["training alone, FSDP2", of_devices(lambda n, d: Cost())],
        ["an average, and validation under it", of_devices(lambda n, d: Cost(2 * scale.average(n, d).device))],
        ["a window of five, and validation under it",
         of_devices(lambda n, d: Cost(scale.window(n, d).device + scale.swap(n, d).device))],
        ["training alone, each device the whole model", each(Cost())],
        ["two branches in turn", each(scale.in_turn(unit, 2))],
        ["a branch per process, averaged", each(scale.per_process(unit, 8))],
        ["DiLoCo", each(scale.diloco(unit, 8))],
        ["streaming DiLoCo, 8 fragments, 8 bits", each(scale.streaming(unit, 8))],
        ["a file of 8 branches, host memory of the first process",
         _largest(scale.save_branches(unit, 8).host / unit, 8 * MACHINE.host)],
        ["a file of 64 branches, the same", _largest(scale.save_branches(unit, 64).host / unit, 8 * MACHINE.host)],
    ]  # fmt: skip
    return _table(["", "largest model (8 and 4,096 devices where it is sharded)"], rows)


def counts() -> str:
    """What was counted, beside the formulas."""
    found: dict[str, dict[int, str]] = {}
    for row in json.loads(COUNTS.read_text(encoding="utf-8"))["rows"]:
        text = f"{row['counted']:,}"
        if row["counted"] != row["formula"]:
            text += f" ({row['formula']:,})"
        found.setdefault(row["what"], {})[row["processes"]] = text
    worlds = (1, 2, 4)
    rows = [[what, *(cells.get(world, "") for world in worlds)] for what, cells in found.items()]
    return _table(["bytes", *(f"{world} process{'es' * (world > 1)}" for world in worlds)], rows)


def machine() -> str:
    """The sentence with the rates."""
    return (
        f"A device has {_bytes(MACHINE.memory)}, of which {100 * MACHINE.usable:.0f} % are for what is counted here and"
        f" the rest for activations, and {_bytes(MACHINE.host)} of host memory as its share. It moves"
        f" {_bytes(MACHINE.device_rate)}/s in its own memory, {_bytes(MACHINE.bus)}/s to the host,"
        f" {_bytes(MACHINE.link)}/s to another device (one port of 400 Gb/s),"
        f" {_bytes(BETWEEN_SITES.link)}/s to another site,"
        f" {_bytes(MACHINE.disk)}/s to files. A number that trains takes {TRAINING} bytes: itself, its gradient and"
        f" {MOMENTS} moments in float32. Nothing is overlapped. These are assumptions, not measurements."
    )


BLOCKS = {
    "machine": machine,
    "limits": limits,
    "sharded": sharded,
    "branches": branches,
    "merging": merging,
    "counts": counts,
}


def made(page: str) -> str:
    """The page with its blocks made anew."""
    for name, block in BLOCKS.items():
        begin, end = f"<!-- scale {name}: made by docs/make_scale.py -->", f"<!-- scale {name}: end -->"
        text = f"{begin}\n\n{block()}\n\n{end}"
        page, count = re.subn(f"{re.escape(begin)}.*?{re.escape(end)}", lambda _: text, page, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"the page must have the block {name!r} once, found {count}.")
    return page


if __name__ == "__main__":
    PAGE.write_text(made(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
