"""The sets of a file on their way into a module that has changed since: through its own hooks, each as a file."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.lazy import LazyModuleMixin

from lightning_merge import weights
from lightning_merge.inventory import Inventory, canonical
from lightning_merge.weights import Weights


class Migration:
    """Makes of each set in a checkpoint what the module's ``on_load_checkpoint`` and ``load_state_dict`` make of it.

    A hook that renames, completes or reshapes does so to raw weights and averages alike. It is handed, for each set,
    the checkpoint with that set in ``state_dict``; what it leaves on the module is undone, but for the raw weights,
    with which it is called last, by Lightning.

    Args:
        module: The module that is loaded.
        inventory: Its tensors.
        checkpoint: The whole file.
        section: Our part of it.
        hook: The module's own ``on_load_checkpoint``.
    """

    def __init__(
        self,
        module: Any,
        inventory: Inventory,
        checkpoint: dict[str, Any],
        section: dict[str, Any],
        hook: Callable[[Any], None],
    ) -> None:
        self._module = module
        self._inventory = inventory
        self._checkpoint = checkpoint
        self._saved: dict[str, Any] = checkpoint["state_dict"]
        self._names: dict[str, str] = section.get("names", {})
        self._hook = hook
        self._known = {self._name(key) for key in self._saved} | section["raw"].keys() | inventory.tensors.keys()

    def file_of(self, tensors: Weights) -> dict[str, Any]:
        """The file's ``state_dict`` with tensors in the place of those of their names."""
        return {key: self._placed(key, value, tensors) for key, value in self._saved.items()}

    def unplaced(self, tensors: Weights) -> Weights:
        """The tensors for whose names the file has no key."""
        placed = {self._name(key) for key in self._saved}
        return {name: tensor for name, tensor in tensors.items() if name not in placed}

    def of_states(self, states: dict[str, Any]) -> dict[str, Any]:
        """The states of averages with every set in them as the module's hooks make it."""
        if _is_lightnings(self._hook) and not self._loads_its_own_way:
            return states
        found: dict[str, Any] = self._migrated(states)
        return found

    def _name(self, key: str) -> str:
        known = self._names.get(key) or self._inventory.keys.get(key)
        return canonical(key) if known is None else known

    def _placed(self, key: str, value: Any, tensors: Weights) -> Any:
        tensor = tensors.get(self._name(key))
        if tensor is None or not isinstance(value, Tensor):
            return value if tensor is None else tensor
        return self._inventory.in_shape_of(key, tensor) if key in self._inventory.keys else tensor

    def _migrated(self, nested: Any) -> Any:
        if isinstance(nested, dict):
            if nested and all(isinstance(t, Tensor) for t in nested.values()) and nested.keys() <= self._known:
                return self._through_hooks(nested) if self._is_of_weights(nested) else self._renamed(nested)
            return {key: self._migrated(value) for key, value in nested.items()}
        return [self._migrated(value) for value in nested] if isinstance(nested, list) else nested

    def _is_of_weights(self, tensors: Weights) -> bool:
        """Whether they have the shapes of weights, and not those of several models laid side by side."""
        return all(tensors[name].shape == shape for name, shape in self._shapes.items() if name in tensors)

    @property
    def _shapes(self) -> dict[str, torch.Size]:
        return {self._name(key): t.shape for key, t in self._saved.items() if isinstance(t, Tensor)}

    def _renamed(self, tensors: Weights) -> Weights:
        """What is kept per tensor but is no weights, under the names that the hooks give those."""
        marks = {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(self._shapes.items(), 1)}
        marked = [*marks]
        found: Weights = {}
        for name, mark in self._through_hooks(marks).items():
            number = int(mark.flatten()[0]) if mark.numel() and bool((mark == mark.flatten()[0]).all()) else 0
            if 0 < number <= len(marked) and (old := marked[number - 1]) in tensors:
                found[name] = tensors[old]
        return found

    def _through_hooks(self, tensors: Weights) -> Weights:
        file = self.file_of(tensors)
        own = {id(tensors[self._name(key)]) for key in file if self._name(key) in tensors}
        others = {id(value) for value in file.values()} - own
        apart = self.unplaced(tensors)
        checkpoint = {**self._checkpoint, "state_dict": dict(file)}
        attributes = dict(self._module.__dict__)
        try:
            self._hook(checkpoint)
        finally:
            self._module.__dict__.clear()
            self._module.__dict__.update(attributes)
        self._inventory.refresh()
        made = {self._name(k): t for k, t in checkpoint["state_dict"].items() if isinstance(t, Tensor)}
        # What the hook adds belongs to a set of weights, and not to one of a few buffers.
        is_main = 2 * len(tensors) >= len([value for value in file.values() if isinstance(value, Tensor)])
        taken = {
            name: tensor
            for name, tensor in made.items()
            if name in tensors or id(tensor) in own or (is_main and id(tensor) not in others)
        }
        migrated = {**taken, **apart}
        if self._loads_its_own_way and not migrated.keys() <= self._inventory.tensors.keys():
            return {**apart, **self._as_loaded(checkpoint["state_dict"])}
        return migrated

    @property
    def _loads_its_own_way(self) -> bool:
        """Whether hooks of the module change names when a state dict is loaded."""
        cls = type(self._module)
        parts = self._module.modules()
        return cls.load_state_dict is not torch.nn.Module.load_state_dict or any(
            part._load_state_dict_pre_hooks for part in parts if not isinstance(part, LazyModuleMixin)
        )

    def _as_loaded(self, state_dict: dict[str, Any]) -> Weights:
        """What the module has under its names once it has loaded a state dict, without keeping it."""
        live, ties = self._inventory.tensors, self._inventory.ties
        averaged = {name: tensor for name, tensor in live.items() if weights.is_averaged(tensor)}
        empty = {name: torch.full_like(t, torch.nan, dtype=weights.average_dtype(t)) for name, t in averaged.items()}
        before: Weights = {}
        try:
            weights.exchange(live, empty, before, ties)
            self._module.load_state_dict(dict(state_dict), strict=False)
            return {name: t for name, t in weights.copies(averaged).items() if not bool(t.isnan().all())}
        finally:
            weights.put_back(live, before, ties)


def _is_lightnings(hook: Any) -> bool:
    return getattr(getattr(hook, "__func__", None), "__module__", "").endswith("pytorch.core.hooks")
