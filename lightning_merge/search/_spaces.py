"""Which coefficients a search may try."""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias, final

from lightning_merge._checks import LISTED, number, settle

Coefficients: TypeAlias = tuple[float, ...]
"""One number per ingredient (a checkpoint, a branch), in their order."""

_ROUNDING = 1e-9


class Space(ABC):
    """A set of coefficients: a frozen dataclass of its bounds."""

    @abstractmethod
    def contains(self, values: Sequence[float]) -> bool:
        """Whether coefficients belong to it, up to rounding.

        Args:
            values: One number per ingredient.
        """

    @abstractmethod
    def nearest(self, values: Sequence[float]) -> Coefficients:
        """The coefficients of this space that are nearest to these numbers (least squares).

        Args:
            values: One number per ingredient.
        """

    @abstractmethod
    def dimensions(self, count: int) -> int:
        """Numbers that choose the coefficients of ``count`` ingredients.

        Args:
            count: Number of ingredients; at least 1.
        """

    @abstractmethod
    def from_unit(self, numbers: Sequence[float]) -> Coefficients:
        """The coefficients that so many numbers in [0, 1] stand for.

        Args:
            numbers: As many numbers in [0, 1] as ``dimensions`` says.
        """

    @abstractmethod
    def to_unit(self, values: Sequence[float]) -> list[float]:
        """Numbers in [0, 1] that ``from_unit`` turns into these coefficients.

        Args:
            values: One number per ingredient.
        """

    @abstractmethod
    def lattice(self, count: int, step: float) -> Iterator[Coefficients]:
        """All coefficients of ``count`` ingredients that are whole steps apart.

        Args:
            count: Number of ingredients; at least 1.
            step: Distance between neighbours in a coefficient; in (0, 1].
        """

    def alike(self, values: Sequence[float]) -> Coefficients:
        """The coefficients that are these, in every group of tensors that has its own.

        Args:
            values: One number per ingredient.
        """
        return tuple(values)

    def moved(self, values: Sequence[float], index: int, size: float) -> Coefficients:
        """A small move for a measured slope: here towards the ingredient of an index, which keeps the sum.

        Args:
            values: The coefficients.
            index: Which of them rises.
            size: Share of the way, in (0, 1).
        """
        return tuple((1.0 - size) * a + size * (each == index) for each, a in enumerate(values))


@final
@dataclass(frozen=True)
class Simplex(Space):
    """At least 0, and one in sum: weighted means.

    Example:
        >>> Simplex().nearest((0.9, 0.5, -1.0))
        (0.7, 0.3, 0.0)
        >>> list(Simplex().lattice(2, step=0.5))
        [(1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    """

    def contains(self, values: Sequence[float]) -> bool:
        return _sums_to_one(values) and _within(values, 0.0, 1.0)

    def nearest(self, values: Sequence[float]) -> Coefficients:
        return tuple(values) if self.contains(values) else _onto_plane(values, 0.0, 1.0)

    def dimensions(self, count: int) -> int:
        return count - 1

    def from_unit(self, numbers: Sequence[float]) -> Coefficients:
        # Breaks the stick so that numbers that are uniform in [0, 1] give points that are uniform on the simplex.
        rest, broken = 1.0, []
        for index, each in enumerate(numbers):
            piece = rest * (1.0 - each ** (1.0 / (len(numbers) - index)))
            broken.append(piece)
            rest -= piece
        return (*broken, rest)

    def to_unit(self, values: Sequence[float]) -> list[float]:
        rest, numbers = 1.0, []
        for index, value in enumerate(values[:-1]):
            kept = min(max(1.0 - value / rest, 0.0), 1.0) if rest > 0.0 else 1.0
            numbers.append(kept ** (len(values) - 1 - index))
            rest -= value
        return numbers

    def lattice(self, count: int, step: float) -> Iterator[Coefficients]:
        parts = _whole("1", 1.0, step)
        for bars in itertools.combinations(range(parts + count - 1), count - 1):
            edges = (-1, *bars, parts + count - 1)
            yield tuple((right - left - 1) / parts for left, right in itertools.pairwise(edges))[::-1]


@dataclass(frozen=True)
class _Bounded(Space):
    low: float = -1.0
    high: float = 2.0

    def __post_init__(self) -> None:
        settle(self, low=number("low", self.low), high=number("high", self.high))
        if not (self.low <= 0.0 and self.high >= 1.0):
            raise ValueError(f"`low` must be at most 0 and `high` at least 1, got {self.low} and {self.high}.")


@final
@dataclass(frozen=True)
class Negative(_Bounded):
    """One in sum, each in [``low``, ``high``]: extrapolations too.

    Args:
        low: Least coefficient; at most 0.
        high: Largest coefficient; at least 1.

    Raises:
        ValueError: If a bound is out of its range.

    Example:
        >>> Negative().nearest((1.5, 0.0))
        (1.25, -0.25)
    """

    def contains(self, values: Sequence[float]) -> bool:
        return _sums_to_one(values) and _within(values, self.low, self.high)

    def nearest(self, values: Sequence[float]) -> Coefficients:
        return tuple(values) if self.contains(values) else _onto_plane(values, self.low, self.high)

    def dimensions(self, count: int) -> int:
        return count - 1

    def from_unit(self, numbers: Sequence[float]) -> Coefficients:
        chosen = [self.low + (self.high - self.low) * each for each in numbers]
        return self.nearest((1.0 - math.fsum(chosen), *chosen))

    def to_unit(self, values: Sequence[float]) -> list[float]:
        return [(value - self.low) / (self.high - self.low) for value in values[1:]]

    def lattice(self, count: int, step: float) -> Iterator[Coefficients]:
        for chosen in itertools.product(_marks(self.low, self.high, step), repeat=count - 1):
            point = (1.0 - math.fsum(chosen), *chosen)
            if self.contains(point):
                yield point


@final
@dataclass(frozen=True)
class Free(_Bounded):
    """Each in [``low``, ``high``], whatever their sum: for task vectors, which may be scaled.

    Args:
        low: Least coefficient; at most 0.
        high: Largest coefficient; at least 1.

    Raises:
        ValueError: If a bound is out of its range.

    Example:
        >>> Free(high=1.0).nearest((1.5, 0.25))
        (1.0, 0.25)
    """

    def contains(self, values: Sequence[float]) -> bool:
        return _within(values, self.low, self.high)

    def nearest(self, values: Sequence[float]) -> Coefficients:
        return tuple(min(max(value, self.low), self.high) for value in values)

    def moved(self, values: Sequence[float], index: int, size: float) -> Coefficients:
        return tuple(a + size * (each == index) for each, a in enumerate(values))

    def dimensions(self, count: int) -> int:
        return count

    def from_unit(self, numbers: Sequence[float]) -> Coefficients:
        return tuple(self.low + (self.high - self.low) * each for each in numbers)

    def to_unit(self, values: Sequence[float]) -> list[float]:
        return [(value - self.low) / (self.high - self.low) for value in values]

    def lattice(self, count: int, step: float) -> Iterator[Coefficients]:
        yield from itertools.product(_marks(self.low, self.high, step), repeat=count)


def one_hot(count: int, index: int) -> Coefficients:
    """The coefficients that take one ingredient as it is."""
    return tuple(1.0 if each == index else 0.0 for each in range(count))


def _sums_to_one(values: Sequence[float]) -> bool:
    return abs(math.fsum(values) - 1.0) <= _ROUNDING


def _within(values: Sequence[float], low: float, high: float) -> bool:
    return all(low - _ROUNDING <= value <= high + _ROUNDING for value in values)


def _onto_plane(values: Sequence[float], low: float, high: float) -> Coefficients:
    """Least squares onto ``sum = 1`` within bounds: all move by the same amount as far as they can."""

    def moved(amount: float) -> Coefficients:
        return tuple(min(max(value - amount, low), high) for value in values)

    least, most = min(values) - high, max(values) - low
    for _ in range(200):
        middle = (least + most) / 2
        if math.fsum(moved(middle)) > 1.0:
            least = middle
        else:
            most = middle
    return tuple(round(value, 15) + 0.0 for value in moved(most))


def _marks(low: float, high: float, step: float) -> list[float]:
    count = _whole(f"{high} - {low}", high - low, step)
    return [low + (high - low) * index / count for index in range(count + 1)]


def _whole(length: str, value: float, step: float) -> int:
    if not step > 0.0 or value / step > LISTED:
        raise ValueError(f"`step` must divide {length} into at most {LISTED} steps, got {step}.")
    count = round(value / step)
    if abs(count * step - value) > _ROUNDING or count < 1:
        raise ValueError(f"`step` must divide {length} into whole steps, got {step}.")
    return count
