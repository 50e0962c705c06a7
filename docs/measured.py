"""The figures of README and the cards, from ``benchmarks/results``: ``python docs/measured.py`` prints them.

What ± says is in ``docs/glossary.md``, for all pages.
"""

import json
import math
import statistics
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from scipy.stats import t as student

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"


class Comparison(NamedTuple):
    """Scores of all contestants in percent, one per seed in the same order."""

    title: str
    scores: dict[str, list[float]]
    beside: str
    file: str
    digits: int = 1

    def difference(self, contestant: str, beside: str | None = None) -> tuple[float, float]:
        """Mean and half the width of the interval of what a contestant has more, in points."""
        other = self.scores[beside or self.beside]
        return interval([a - b for a, b in zip(self.scores[contestant], other, strict=True)])


@cache
def comparisons() -> dict[str, Comparison]:
    """All comparisons of accuracy, by the name under which a card has it among what was ``measured``."""
    found = {
        "quality-digits": _of_tests("quality-digits", "digits, constant rate", "raw", 2),
        "quality-cifar10": _of_tests("quality-cifar10", "CIFAR-10, 8436 steps, constant rate", "raw"),
        "trajectory-quality": _of_tests("trajectory-quality", "CIFAR-10, 2000 steps, constant rate", "plain"),
        "branches-cifar10": _of_tests("branches-cifar10", "CIFAR-10, 2700 steps, cosine to 0", "sgd"),
        "forkmerge-cifar10": _of_tests("forkmerge-cifar10", "CIFAR-10, 4500 images, cosine to 0", "target only"),
        "preference": Comparison(
            "preference pairs", of_preference("accuracy", 100), "AdamW, learning rate 1", "preference"
        ),
        "anneal-quality": Comparison(
            "tinyshakespeare, loss in hundredths, negated", of_losses(), "raw", "anneal-quality"
        ),
        **of_evidence(),
    }
    for data, title in (("cifar10", "split CIFAR-10"), ("tiny", "50 classes of Tiny ImageNet")):
        for name, score in (("", "accuracy_in_task"), ("-seen", "accuracy")):
            scores = of_streams(data, score, "final_average")
            found[f"continual-{data}{name}"] = Comparison(
                f"{title}, {'seen' if name else 'told the task'}", scores, "naive", "continual"
            )
    return found


def verdict(measured: dict[str, list[str]]) -> str:
    """``helps``, ``conditional`` (in some settings), ``does not``, or ``not measured``.

    A method helps in a setting where the whole interval of its difference lies above 0.
    """
    differences = [comparisons()[name].difference(each) for name, names in measured.items() for each in names]
    helps, count = counted(differences)
    if not count:
        return "not measured"
    if helps == count:
        return "helps"
    return f"conditional: {helps} of {count}" if helps else "does not"


def counted(differences: list[tuple[float, float]]) -> tuple[int, int]:
    """How many differences have their whole interval above 0, and how many there are."""
    return sum(mean - half > 0 for mean, half in differences), len(differences)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval."""
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half


def as_difference(mean: float, half: float, digits: int = 1) -> str:
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def as_value(values: list[float], digits: int = 1) -> str:
    return f"{statistics.fmean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def figures() -> dict[str, str]:
    """Every figure with ±, and where it comes from."""
    found: dict[str, str] = {}
    for name, each in comparisons().items():
        for one in each.scores:
            found.setdefault(as_value(each.scores[one]), f"{name}: {one}")
            for other in each.scores:
                if other != one:
                    text = as_difference(*each.difference(one, other), each.digits)
                    found.setdefault(text, f"{name}: {one} beside {other}")
    for name in ("quality-digits", "quality-cifar10"):
        for one, reached in read(name)["steps_to_raw_final_over_raw"].items():
            text = f"{reached['mean']:.2f} ± {reached['half_width']:.2f}"
            found.setdefault(text, f"{name}: steps of {one} to the final score of raw, over those of raw")
    for one, values in of_preference("forgetting").items():
        found.setdefault(as_value(values, 2), f"preference: forgetting of {one}")
    for data in ("cifar10", "tiny"):
        for one, values in of_streams(data, "accuracy_in_task", "forgetting").items():
            found.setdefault(as_value(values), f"continual-{data}: forgetting of {one}")
    for one in ("raw", "raw_measured_again", "swa", "annealed"):
        values = [100 * run[one] for run in read("first-run")["runs"]]
        found.setdefault(as_value(values), f"first-run: val/acc of {one}")
    for name, sets in digits_recipes().items():
        for one, values in sets.items():
            if len(values) > 2:
                is_loss = name == "digits/search"
                text = as_value([value / 100 for value in values], 3) if is_loss else as_value(values)
                found.setdefault(text, f"digits-recipes: {one} of {name}")
    for names, difference in read("anneal-quality").items():
        if " - " in names:
            found.setdefault(as_difference(*difference, 3), f"anneal-quality: held-out loss, {names}")
    for one, difference in read("streaming-diloco")["more than diloco"].items():
        found.setdefault(as_difference(*difference, 3), f"streaming-diloco: held-out loss, {one} beside diloco")
    return found


# ---- the files


@cache
def digits_recipes() -> dict[str, dict[str, list[float]]]:
    """Of each recipe the scores of its sets in percent, one per seed."""
    found: dict[str, dict[str, list[float]]] = {}
    for run in sorted(read("digits-recipes")["runs"], key=lambda run: int(run["seed"])):
        sets = found.setdefault(run["recipe"], {})
        for one in ("merged", "raw", "seen", "told"):
            if one in run:
                sets.setdefault(one, []).append(100 * run[one])
    return found


@cache
def read(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def _of_tests(name: str, title: str, beside: str, digits: int = 1) -> Comparison:
    tests = [run["test"] for run in read(name)["runs"]]
    return Comparison(title, {each: [100 * test[each] for test in tests] for each in tests[0]}, beside, name, digits)


def of_evidence() -> dict[str, Comparison]:
    """The protocols of ``benchmarks/evidence.py``, a comparison for each view: ``evidence-NAME: VIEW``."""
    found: dict[str, Comparison] = {}
    for path in sorted(RESULTS.glob("evidence-*.json")):
        runs, name = sorted(read(path.stem)["runs"], key=lambda run: int(run["seed"])), path.stem
        for view in runs[0]["scores"] if len(runs) > 2 else ():
            scores = {one: [run["scores"][view][one] for run in runs] for one in runs[0]["scores"][view]}
            title = f"{name.removeprefix('evidence-')}, {view}"
            found[f"{name}: {view}"] = Comparison(title, scores, read(name)["beside"], name)
    return found


def of_losses() -> dict[str, list[float]]:
    """Of Anneal, the mean over the points of each seed."""
    runs = read("anneal-quality")["runs"]
    names = [name for name in runs[0][0] if name != "step"]
    return {name: [-100 * statistics.fmean(row[name] for row in run) for run in runs] for name in names}


def of_preference(score: str, factor: float = 1) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for point in (point for run in read("preference")["runs"] for point in run["points"]):
        found.setdefault(f"{point['method']} {point['strength']:g}", []).append(factor * point[score])
    return found


def of_streams(data: str, score: str, metric: str) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for run in sorted(read("continual")["runs"], key=lambda run: int(run["seed"])):
        if run["data"] == data and metric in run["metrics"][score]:
            found.setdefault(run["method"]["name"], []).append(100 * run["metrics"][score][metric])
    return found


if __name__ == "__main__":
    for text, source in figures().items():
        print(f"{text:16} {source}")
