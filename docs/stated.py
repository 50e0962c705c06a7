"""What pages say about time, memory and resuming, from ``benchmarks/results``: ``python docs/stated.py`` prints it.

Each page must hold these words as they are; figures with ± are in ``measured.py``.
"""

from typing import Any

from measured import comparisons, read

RESUMED = ("resume", "resume-branches", "resume-policies", "resume-search", "resume-streaming", "resume-trajectory")


def stated() -> dict[str, list[str]]:
    """Words by page, below ``docs/``."""
    return {
        "methods/checkpoint-soups.md": _soups(),
        "methods/combiners.md": _combiners(),
        "methods/ondare.md": _online(),
        "methods/onties.md": [_seconds("OnTIES, density 0.5"), _seconds("OnTIES, published order, density 0.5", 1)],
        "methods/twa.md": [f"{read('twa')['products_over_limit']:.2f} x the time of two plain reads"],
        "methods/continual-merging.md": [f"{_resumed('continual-resume')} killed streams resume bit for bit"],
        "methods/diloco.md": _streaming(),
        "resume.md": [f"`{name}.json` {_resumed(name)}" for name in RESUMED],
        "strategies.md": _scaling(),
        **{f"methods/{name}.md": _averages(name) for name in ("ema", "swa", "lawa", "swad")},
    }


def _streaming() -> list[str]:
    found = [row["formula"] for row in read("streaming-diloco")["sent"]]
    return [f"| {each['per step']:,.0f} | {each['most']:,.0f} |" for each in found]


def _averages(name: str) -> list[str]:
    means = [
        {each: sum(values) / len(values) for each, values in comparisons()[f"quality-{data}"].scores.items()}
        for data in ("digits", "cifar10")
    ]
    return [f"{mean[name]:.1f} % against {mean['raw']:.1f} %" for mean in means]


def _soups() -> list[str]:
    some, full = read("soup")["median"], read("soup-full")["median"]
    return [
        f"{some['ours']['over read']:.2f} x reading them once",
        f"a loop that loads them all {some['load all']['over read']:.1f} x",
        f"files with optimizer state {full['ours']['over read']:.2f} x",
    ]


def _combiners() -> list[str]:
    over = {name: values[0] for name, values in read("combiners-streams")["over_limit"].items()}
    copies = {name: each["copies"] for name, each in read("combiners")["stream_peak, returned"].items()}
    stream, checked = over["stream: Sum"], over["stream: Sum, with the check for NaN"]
    at_once = [over[f"at once: {name}"] for name in ("Sum", "Average", "MagMax")]
    return [
        f"a stream of sums {stream:.2f} ({checked:.2f} with the check for NaN)",
        "sum {:.1f}, mean {:.1f}, MagMax {:.1f}".format(*at_once),
        f"{copies['Sum, 8 tasks']:.1f} copies of the weights for sums",
        f"{copies['DARE, 8 tasks']:.1f} for Breadcrumbs and DARE, {copies['TIES, 8 tasks']:.1f} for TIES",
    ]


def _seconds(name: str, digits: int = 2) -> str:
    return f"{read('online')['steps']['seconds'][name]:.{digits}f} s"


def _online() -> list[str]:
    return [
        f"{_seconds('OnDARE, density 0.5')} at a density of 0.5 and {_seconds('OnDARE, density 0.01')} at 0.01",
        f"{_seconds('AdamW, fused')} fused and {_seconds('AdamW, foreach')} with foreach",
        f"published code takes {_seconds('OnDARE, published order, density 0.5', 1)}",
    ]


def _resumed(name: str) -> str:
    rows = read(name)["rows"]
    return f"{sum(row['equal'] for row in rows)} of {len(rows)}"


def _scaling() -> list[str]:
    rows: list[dict[str, Any]] = [row for row in read("scaling")["rows"] if row["parameters"] == "100 M"]
    update, swap = ([row[f"{what} over limit"] for row in rows] for what in ("update", "swap"))
    small = next(row for row in read("scaling")["rows"] if row["parameters"] == "10 M" and row["processes"] == 4)
    return [
        f"{min(update):.1f} to {max(update):.1f} x a flat, in-place `lerp_`",
        f"({rows[0]['update ms']:.0f} ms in one process, {rows[1]['update ms']:.0f} in two)",
        f"{min(swap):.1f} to {max(swap):.1f} x the three copies",
        f"{small['update over limit']:.1f} x the limit",
    ]


if __name__ == "__main__":
    for page, words in stated().items():
        print(page, *words, sep="\n    ")
