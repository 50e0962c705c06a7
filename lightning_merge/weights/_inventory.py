"""Inventory: where each tensor of a module lives, under which names, and which names are the same numbers.

Names are canonical: the prefixes that ``torch.compile`` and wrappers insert are removed, so a name means the same in
every run and file.
"""

import gc
from collections.abc import Mapping
from operator import is_
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from lightning_merge.weights._memory import region, view
from lightning_merge.weights._names import canonical, submodules
from lightning_merge.weights._overlaps import refuse_overlaps
from lightning_merge.weights._places import Kind, Place, places_of


class Inventory:
    """The parameters and buffers of a module as they are now, each once, by the first of its names.

    Tensors that are the same numbers in memory are one group, whether that is one object under two names, two objects
    over one storage, a transposed or flattened view, or a buffer over a parameter. ``refresh`` finds what was replaced,
    resized, added, removed or tied since; it costs about 0.15 microseconds per tensor where nothing was.

    Args:
        module: What torchmetrics metrics hold does not count, nor do buffers that are not saved.

    Attributes:
        parameters: Of each group that holds a parameter the first one, by canonical name.
        buffers: Of each other group the first buffer that is saved.
        aliases: Every further name of a group, with the name of the group.
        ties: Further tensor objects over a group's numbers, by the name of the group; for most modules empty.
        keys: The name of the group of each key of ``module.state_dict()``, as torch makes it.
        version: Rises whenever something was replaced, resized, added, removed or tied.

    Raises:
        ValueError: If two tensors overlap in memory and are not the same numbers.

    Example:
        >>> module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        >>> module[1].weight = module[0].weight
        >>> Inventory(module).aliases
        {'1.weight': '0.weight'}
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.version = 0
        self._walk()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers."""
        return self._tensors

    def refresh(self, *, sizes: bool = True) -> bool:
        """Looks all tensors up again; whether something has changed.

        Args:
            sizes: Whether to look as well if one has another size than at the last look, as observers give theirs.
        """
        if self._is_unchanged(sizes) and not self._has_lazy:
            return False
        self._walk()
        return True

    def look_anew(self) -> None:
        """Finds also which tensors lie over each other by now, as after ``a.data = b.data``, which no look sees."""
        self._walk()

    @property
    def title(self) -> str:
        """What messages call the module."""
        return type(self._module).__name__

    def names_of(self, name: str) -> list[str]:
        """All names of a group, its own first."""
        return [name, *self._further.get(name, ())]

    def under_every_name(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights with those of each group also under its further names, in the shapes these have."""
        further = {alias: owner for alias, owner in self.aliases.items() if owner in weights and alias in self._alias}
        views = {n: view(weights[owner], self._tensors[owner], self._alias[n]) for n, owner in further.items()}
        return {**weights, **views}

    def in_shape_of(self, key: str, tensor: Tensor) -> Tensor:
        """A group's tensor in the shape that it has under a key of the state dict."""
        other = self._alias.get(canonical(key))
        return tensor if other is None else view(tensor, self._tensors[self.keys[key]], other)

    def put_objects_back(self) -> None:
        """Makes names that were assigned anew since the last look lead to the tensors that they led to then."""
        if not self._is_unchanged():
            for entries, key, value in self._entries:
                if key not in entries or entries[key] is not value:
                    entries[key] = value

    def _is_unchanged(self, sizes: bool = True) -> bool:
        """Whether every name leads to the object that it led to at the last look, as large as it was then.

        This is asked at every step.
        """
        found = self._present()
        return (
            len(found) == len(self._seen)
            and all(map(is_, found, self._seen))
            and (not sizes or list(map(Tensor.numel, self._sized)) == self._sizes)
        )

    def _present(self) -> list[Any]:
        """What all names lead to."""
        # The dicts of a module lie in no cache after a step: a walk from one to the next in Python would take twice as
        # long as all else that a step asks.
        found = gc.get_referents(*self._plain)
        for each in self._special:
            found += each.values()
        return found

    def _walk(self) -> None:
        owners = list(submodules(self._module))
        tensors = [entries for _, owner in owners for entries in (owner._parameters, owner._buffers)]
        self._entries: list[tuple[Any, str, Any]] = [
            (entries, key, value) for entries in tensors for key, value in entries.items()
        ]
        everything = [*tensors, *(owner._modules for _, owner in owners)]
        self._plain = [entries for entries in everything if type(entries) is dict]
        self._special = [entries for entries in everything if type(entries) is not dict]  # as scripted modules have
        self._seen = self._present()
        self._has_lazy = any(isinstance(value, UninitializedTensorMixin) for value in self._seen)
        # Observers and pruning give a tensor another shape as it is. Their number alone is cheap to ask.
        self._sized = [
            each for each in self._seen if isinstance(each, Tensor) and not isinstance(each, UninitializedTensorMixin)
        ]
        self._sizes = list(map(Tensor.numel, self._sized))
        self.version += 1
        places = sorted(places_of(owners), key=lambda place: _ORDER[place.kind])  # stable: in the order of the module
        groups: dict[tuple[Any, ...], Place] = {}
        self.parameters: dict[str, nn.Parameter] = {}
        self.buffers: dict[str, Tensor] = {}
        self.aliases: dict[str, str] = {}
        self.ties: dict[str, list[Tensor]] = {}
        self.keys: dict[str, str] = {}
        self._alias: dict[str, Tensor] = {}
        self._further: dict[str, list[str]] = {}
        for place in places:
            first = groups.setdefault(region(place.tensor), place)
            name, owner = canonical(place.name), canonical(first.name)
            if first.kind in ("parameter", "buffer") and place.kind in ("parameter", "buffer"):
                self.keys[place.name] = owner
            if first is place:
                if place.kind == "parameter":
                    self.parameters[name] = place.tensor  # type: ignore[assignment]
                elif place.kind == "buffer":
                    self.buffers[name] = place.tensor
            elif first.kind in ("parameter", "buffer"):
                self._tie(name, owner, place, first)
        self._tensors: dict[str, Tensor] = {**self.parameters, **self.buffers}
        refuse_overlaps([group for group in groups.values() if group.tensor.numel()])

    def _tie(self, name: str, owner: str, place: Place, first: Place) -> None:
        if place.kind in ("parameter", "buffer") and name != owner:
            self.aliases[name] = owner
            self._further.setdefault(owner, []).append(name)
            self._alias[name] = place.tensor
        others = self.ties.get(owner, ())
        if place.tensor is not first.tensor and not any(place.tensor is other for other in others):
            self.ties.setdefault(owner, []).append(place.tensor)


_ORDER: dict[Kind, int] = {"parameter": 0, "buffer": 1, "passing": 2, "attribute": 3}


def named_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters under canonical names; tied ones appear once, those inside torchmetrics metrics never."""
    return Inventory(module).parameters


def named_buffers(module: nn.Module) -> dict[str, Tensor]:
    """Persistent buffers under canonical names; shared ones appear once, those inside torchmetrics metrics never."""
    return Inventory(module).buffers


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers under canonical names."""
    return Inventory(module).tensors


def state_dict_names(module: nn.Module) -> dict[str, str]:
    """The name in ``named_tensors`` of every key of ``module.state_dict()``.

    Tied tensors are tracked once but saved under each of their names, so a file needs the way back.
    """
    return Inventory(module).keys
