"""Groups of axes that number the same units, joined as a forward pass shows that they do."""

from dataclasses import dataclass, field
from typing import final


@final
@dataclass(eq=False)
class Group:
    """Axes of tensors with an entry, or a block of entries, for each unit."""

    size: int
    axes: dict[tuple[str, int], int] = field(default_factory=dict)
    is_fixed: bool = False
    _into: "Group | None" = None

    @property
    def root(self) -> "Group":
        """The group that this one has become a part of."""
        return self if self._into is None else self._into.root

    def join(self, other: "Group") -> "Group":
        """Makes both one; those that differ in size are both fixed."""
        one, two = self.root, other.root
        if one is two:
            return one
        if one.size != two.size:
            one.is_fixed = two.is_fixed = True
            return one
        one.axes |= two.axes
        one.is_fixed |= two.is_fixed
        two._into = one
        return one

    def add(self, name: str, axis: int, block: int = 1) -> None:
        """An axis of a tensor; one that is there with other blocks is fixed."""
        group = self.root
        if group.axes.setdefault((name, axis), block) != block:
            group.is_fixed = True

    def fix(self) -> None:
        """Keeps the units in their order."""
        self.root.is_fixed = True
