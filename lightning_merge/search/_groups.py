"""Coefficients of their own for groups of tensors."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, final

from lightning_merge._checks import LISTED, names, numbers, one_of
from lightning_merge.search._spaces import Coefficients, Space

Per: TypeAlias = Literal["model", "tensor", "group"]
"""What shares a coefficient: all of a model, one tensor, or the tensors of one module (its weight and its bias)."""

_MOST_IN_A_GRID = 8

_PER = ("model", "tensor", "group")


def by_tensor(coefficients: Sequence[float], tensors: Sequence[str], per: Per) -> dict[str, Coefficients]:
    """What a score gets, as one number per ingredient for each tensor.

    Args:
        coefficients: Ingredient by ingredient, and in each group by group, in the order in which the groups first come.
        tensors: Names of the tensors, as they were given to ``search``.
        per: ``"model"``, ``"tensor"`` or ``"group"``: the tensors whose names are the same up to the last dot.

    Raises:
        ValueError: If the coefficients are not equally many for each ingredient, or an argument is out of range.

    Example:
        >>> by_tensor((0.1, 0.2, 0.3, 0.4), ["a.weight", "a.bias", "b.weight"], "group")
        {'a.weight': (0.1, 0.3), 'a.bias': (0.1, 0.3), 'b.weight': (0.2, 0.4)}
    """
    coefficients = numbers("coefficients", coefficients)
    places = groups(tensors, per)
    count = 1 + max(places, default=0)
    if not coefficients or len(coefficients) % count:
        raise ValueError(f"`coefficients` must be {count} for each ingredient, got {len(coefficients)} numbers.")
    return {name: tuple(coefficients[place::count]) for name, place in zip(tensors, places, strict=True)}


def groups(tensors: Sequence[str], per: Per) -> list[int]:
    """The group of each tensor: its place among the groups.

    Raises:
        ValueError: If an argument is out of range.
    """
    per, found = one_of("per", per, _PER), names("tensors", tensors)
    if len(set(found)) < len(found) or len(found) > LISTED:
        raise ValueError(f"`tensors` must be at most {LISTED} names, each once, got {len(found)} names.")
    if per != "model" and not found:
        raise ValueError(f"`tensors` must name the tensors where `per` is {per!r}, got none.")
    keys = {"model": ("",) * len(found), "tensor": found, "group": tuple(name.rpartition(".")[0] for name in found)}
    known: dict[str, int] = {}
    return [known.setdefault(key, len(known)) for key in keys[per]]


@final
@dataclass(frozen=True)
class PerGroup(Space):
    """A space in each of several groups: ingredient by ingredient, and in each group by group.

    Args:
        space: Of one group.
        groups: How many there are; at least 1.
    """

    space: Space
    groups: int

    def contains(self, values: Sequence[float]) -> bool:
        return all(map(self.space.contains, self._apart(values)))

    def nearest(self, values: Sequence[float]) -> Coefficients:
        return self._each(self.space.nearest, values)

    def alike(self, values: Sequence[float]) -> Coefficients:
        return tuple(value for value in values for _ in range(self.groups))

    def moved(self, values: Sequence[float], index: int, size: float) -> Coefficients:
        ingredient, group = divmod(index, self.groups)
        apart = self._apart(values)
        apart[group] = self.space.moved(apart[group], ingredient, size)
        return self._together(apart)

    def dimensions(self, count: int) -> int:
        return self.groups * self.space.dimensions(count)

    def from_unit(self, numbers: Sequence[float]) -> Coefficients:
        size = len(numbers) // self.groups
        return self._together([self.space.from_unit(numbers[i * size : (i + 1) * size]) for i in range(self.groups)])

    def to_unit(self, values: Sequence[float]) -> list[float]:
        return [number for group in self._apart(values) for number in self.space.to_unit(group)]

    def lattice(self, count: int, step: float) -> Iterator[Coefficients]:
        if self.groups > _MOST_IN_A_GRID:
            raise ValueError(
                f"`per` must lead to at most {_MOST_IN_A_GRID} groups for a grid, got {self.groups}: take a method that"
                " looks at fewer candidates."
            )
        for first in self.space.lattice(count, step):
            if self.groups == 1:
                yield first
                continue
            for others in PerGroup(self.space, self.groups - 1).lattice(count, step):
                rest = [tuple(others[group :: self.groups - 1]) for group in range(self.groups - 1)]
                yield self._together([first, *rest])

    def _each(self, change: Callable[[Sequence[float]], Coefficients], values: Sequence[float]) -> Coefficients:
        return self._together([change(group) for group in self._apart(values)])

    def _apart(self, values: Sequence[float]) -> list[Coefficients]:
        return [tuple(values[group :: self.groups]) for group in range(self.groups)]

    def _together(self, apart: Sequence[Coefficients]) -> Coefficients:
        return tuple(value for ingredient in zip(*apart, strict=True) for value in ingredient)
