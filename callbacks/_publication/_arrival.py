"""What became, in a file, of the weights that were in place while the module made its ``state_dict``."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_merge import weights
from lightning_merge._ranks import gathered
from lightning_merge.inventory import Inventory, canonical, region


def storage(tensor: Tensor) -> int:
    """Where in memory a tensor is."""
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Arrival:
    """What a ``state_dict`` holds of the weights that it was made of.

    Args:
        names: The canonical name of each key that is called otherwise.
        left_out: Names that no key has, as of slim files.
        converted: Keys whose numbers are others than those in place: cast or packed by the module.
        stale: Keys that hold what was in place before, where that is something else.
    """

    names: dict[str, str]
    left_out: list[str]
    converted: list[str]
    stale: list[str]

    @classmethod
    def of(
        cls,
        state_dict: Mapping[str, Any],
        inventory: Inventory,
        placed: Mapping[str, Tensor],
        before: Mapping[str, Any],
    ) -> "Arrival":
        """Compares a state dict with the weights in place, by memory where it shares that, else by value.

        Args:
            state_dict: What the module has made.
            inventory: Where the weights are in place.
            placed: Those that were put there.
            before: What they were put in the place of, by name.
        """
        look = _Look(inventory, placed, before)
        names, converted, stale, arrived = {}, [], [], set()
        for key, value in state_dict.items():
            if not isinstance(value, Tensor):
                continue
            name, verdict = look.at(key, value)
            if name is not None:
                arrived.add(name)
                if name != canonical(key):
                    names[key] = name
            if verdict == "converted":
                converted.append(key)
            elif verdict == "stale":
                stale.append(key)
        return cls(names, [name for name in placed if name not in arrived], converted, stale)

    def check(self, title: str) -> None:
        """Raises in every process if some weights did not arrive in one.

        Raises:
            RuntimeError: With the names of the first ones.
        """
        if stale := [key for each in gathered(self.stale) for key in each]:
            some = ", ".join(f"`{key}`" for key in stale[:5]) + (", ..." if len(stale) > 5 else "")
            raise RuntimeError(
                f"the file was to hold the weights of {title}, and under {some} the module gave others, those that were"
                " live before. Its `state_dict` keeps copies of its own: let it return the module's own tensors, or"
                " save and validate raw weights (`validate='raw'` and a monitor of theirs)."
            )

    def notes(self) -> dict[str, Any]:
        """What a file's label says of it, if there is something to say."""
        fields = {"names": self.names, "left_out": self.left_out, "converted": self.converted}
        return {field: value for field, value in fields.items() if value}


class _Look:
    def __init__(self, inventory: Inventory, placed: Mapping[str, Tensor], before: Mapping[str, Any]) -> None:
        self._live = weights.local(inventory.tensors)
        self._aliases = inventory.aliases
        self._placed, self._before = placed, before
        self._names = {region(tensor): name for name, tensor in self._live.items()}
        self._names_before = {region(tensor): name for name, tensor in before.items()}

    def at(self, key: str, value: Tensor) -> tuple[str | None, str | None]:
        """The name of what is under a key, if it is known, and what is wrong with it."""
        where = region(value)
        if where in self._names:
            return self._names[where], None
        if where in self._names_before and self._differs(name := self._names_before[where]):
            return name, "stale"
        name = canonical(key)
        name = self._aliases.get(name, name)
        if name not in self._live:
            return self._of_unknown_name(value)
        if weights.is_sharded(value):
            (value,) = weights.local({"": value}).values()
        if name not in self._placed or value.shape != self._placed[name].shape or value.is_meta:
            return name, None  # not one of those, whole where a part is here, or in another shape
        if _equal(value, self._placed[name]):
            return name, None
        return name, "stale" if _equal(value, self._before.get(name)) else "converted"

    def _of_unknown_name(self, value: Tensor) -> tuple[str | None, str | None]:
        """A copy under a name that is not the module's: only its numbers tell what it is."""
        if any(True for _ in self._alike(value, self._placed)):
            return next(self._alike(value, self._placed)), None
        stale = next((n for n in self._alike(value, self._before) if n in self._placed and self._differs(n)), None)
        return stale, None if stale is None else "stale"

    @staticmethod
    def _alike(value: Tensor, weights: Mapping[str, Any]) -> Iterator[str]:
        return (name for name, t in weights.items() if t.shape == value.shape and t.numel() and _equal(value, t))

    def _differs(self, name: str) -> bool:
        return name in self._placed and not _equal(self._before[name], self._placed[name])


def _equal(value: Tensor, tensor: Tensor | None) -> bool:
    """Whether a value is a tensor in the precision of the value."""
    if tensor is None or tensor.shape != value.shape:
        return False
    other = tensor.detach().to(value)
    return torch.equal(value.detach(), other) or bool(torch.allclose(value, other, rtol=0, atol=0, equal_nan=True))
