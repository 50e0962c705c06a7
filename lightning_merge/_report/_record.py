"""What a report keeps of a run."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from lightning_merge._choice import is_eligible, standing
from lightning_merge._saved import Saved

Point: TypeAlias = tuple[int, float]
"""A step, as loggers count, and a value."""

_MOST = 1000
"""Points that are kept of a curve, so that a page stays small whatever the length of the run."""


@dataclass
class Curve(Saved):
    """Values by step. Beyond a thousand every second is let go, but never the lowest, the highest and the last.

    Args:
        points: In the order of steps.
        every: One of so many is kept.
        left_out: How many came since the last that was kept.
        lowest: The lowest value with its step.
        highest: The highest.
        last: The last.
    """

    points: list[Point] = field(default_factory=list)
    every: int = 1
    left_out: int = 0
    lowest: Point | None = None
    highest: Point | None = None
    last: Point | None = None

    def __post_init__(self) -> None:
        self.points = [_point(each) for each in self.points]
        self.lowest, self.highest, self.last = (
            None if each is None else _point(each) for each in (self.lowest, self.highest, self.last)
        )

    def add(self, step: int, value: float) -> None:
        """Takes in a value; a second one of the same step takes the place of the first."""
        if self.last is not None and self.last[0] >= step:
            self.cut(step - 1)
        point = step, float(value)
        self._note(point)
        self.left_out += 1
        if not self.points or self.left_out >= self.every:
            self.points.append(point)
            self.left_out = 0
        if len(self.points) > _MOST:
            self.points, self.every = self.points[::2], 2 * self.every

    def cut(self, step: int) -> None:
        """Forgets what came after a step."""
        self.points = [point for point in self.points if point[0] <= step]
        kept = [each for each in (self.lowest, self.highest, self.last) if each is not None and each[0] <= step]
        self.lowest = self.highest = self.last = None
        for point in sorted(dict([*self.points, *kept]).items()):
            self._note(point)

    def drawn(self) -> list[Point]:
        """All points that are known, in the order of steps."""
        ends = (each for each in (self.lowest, self.highest, self.last) if each is not None)
        return sorted(dict([*self.points, *ends]).items())

    def best(self, mode: Literal["min", "max"]) -> Point | None:
        """The best value with its step; ``None`` if none can be it."""
        found = self.lowest if mode == "min" else self.highest
        return found if found is not None and is_eligible(found[1], mode) else None

    def _note(self, point: Point) -> None:
        self.last = point
        if self.lowest is None or standing(point[1], "min") > standing(self.lowest[1], "min"):
            self.lowest = point
        if self.highest is None or standing(point[1]) > standing(self.highest[1]):
            self.highest = point


@dataclass
class Age(Saved):
    """How old the weights in an average are.

    Args:
        ages: Steps before the last update, growing.
        mass: Share of the average that is at most so old.
        mean: Of the age, over what is not the start.
        start: Share that is the weights of the start.
    """

    ages: list[float]
    mass: list[float]
    mean: float
    start: float


Curves: TypeAlias = dict[str, dict[str, Curve]]
"""By metric, then by the set of weights, or the average, that it is of."""


@dataclass
class Record:
    """A run, as a report shows it.

    Args:
        title: Of the run.
        monitor: The metric that is shown first.
        mode: Which of its values are better.
        measured: What validation measured.
        trained: What was logged while training, of the raw weights.
        health: ``updates``, ``distance``, ``start_share`` and ``decay`` of each average.
        ages: Of each average.
        about: A line on each average.
        notes: Lines for the top of the page.
    """

    title: str = ""
    monitor: str | None = None
    mode: Literal["min", "max"] | None = None
    measured: Curves = field(default_factory=dict)
    trained: Curves = field(default_factory=dict)
    health: Curves = field(default_factory=dict)
    ages: dict[str, Age] = field(default_factory=dict)
    about: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def cut(self, step: int) -> None:
        """Forgets what came after a step, as a run does that goes on from there."""
        for group in (self.measured, self.trained, self.health):
            for metric, curves in list(group.items()):
                for curve in curves.values():
                    curve.cut(step)
                group[metric] = {of: curve for of, curve in curves.items() if curve.points}
                if not group[metric]:
                    del group[metric]
        self.notes.clear()

    def plain(self) -> dict[str, Any]:
        """The same in numbers, words, lists and dicts."""
        found = {name: getattr(self, name) for name in ("title", "monitor", "mode", "about", "notes")}
        found |= {name: _plain(getattr(self, name)) for name in ("measured", "trained", "health", "ages")}
        return found

    @classmethod
    def of(cls, plain: dict[str, Any]) -> "Record":
        """What ``plain`` gave.

        Raises:
            KeyError: If something is missing.
        """
        return cls(
            title=plain["title"],
            monitor=plain["monitor"],
            mode=plain["mode"],
            measured=_curves(plain["measured"]),
            trained=_curves(plain["trained"]),
            health=_curves(plain["health"]),
            ages={name: Age.of(each) for name, each in plain["ages"].items()},
            about=dict(plain["about"]),
            notes=list(plain["notes"]),
        )


def add(curves: Curves, metric: str, of: str, step: int, value: float) -> None:
    """A value of a curve that may not have begun."""
    curves.setdefault(metric, {}).setdefault(of, Curve()).add(step, value)


def aged(ages: Sequence[float], shares: Sequence[float], start: float) -> Age:
    """How old the weights in an average are, with at most a hundred steps of the sum.

    Args:
        ages: Of the weights of each update, youngest first.
        shares: How much each counts.
        start: How much the weights of the start count.
    """
    total, sums = 0.0, []
    for share in shares:
        total += share
        sums.append(total)
    counted = sum(sums[-1:])
    mean = sum(age * share for age, share in zip(ages, shares, strict=True)) / counted if counted else math.nan
    # To where all but a thousandth is: of an exponential mean the rest is a tail of any length.
    end = next((i for i, each in enumerate(sums) if abs(counted - each) < 0.001), len(sums) - 1) if sums else -1
    chosen = sorted({round(i * end / 99) for i in range(100)}) if end >= 0 else []
    return Age([float(ages[i]) for i in chosen], [sums[i] for i in chosen], mean, start)


def _point(pair: Sequence[Any]) -> Point:
    """From a file, which has lists, and words for what is not finite."""
    return int(pair[0]), float(pair[1])


def _plain(nested: Any) -> Any:
    if isinstance(nested, Saved):  # with lists of its own, which do not grow while a file is written
        return {key: list(each) if isinstance(each, list) else each for key, each in nested.section().items()}
    return {key: _plain(value) for key, value in nested.items()}


def _curves(plain: dict[str, Any]) -> Curves:
    return {metric: {of: Curve.of(each) for of, each in group.items()} for metric, group in plain.items()}
