"""Selections: which tensors are merged, and what happens to the buffers."""

from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal, final

from torch import Tensor, nn

from lightning_merge._checks import flag, instance, names, one_of, settle
from lightning_merge.weights import Inventory, is_averaged

BufferPolicy = Literal["average", "copy", "recompute"]


@final
@dataclass(frozen=True)
class Selection:
    """Which tensors of a module are merged. Tensors outside the selection are published as they are live.

    Args:
        include: Glob patterns over canonical parameter names; a parameter must match one.
        exclude: Glob patterns; a parameter that matches one is left out (a head, say: ``("head.*",)``).
        trainable: Leave out parameters that do not require gradients.
        buffers: What becomes of persistent buffers. ``average``: floating-point ones go through the rule like
            parameters, integer ones are copied. ``copy``: all are copied from the model at each update. ``recompute``:
            as ``copy``, and the statistics of BatchNorm layers are measured again under the merged weights.

    Raises:
        TypeError: If patterns are no texts, or ``trainable`` no flag.
        ValueError: If ``buffers`` is none of these, ``include`` is empty, or at fit start if a pattern matches no
            name, or no parameter is selected.

    Example:
        >>> from torch import nn
        >>> module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
        >>> list(Selection(exclude=["1.*"]).parameters(module))
        ['0.weight', '0.bias']
    """

    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    trainable: bool = False
    buffers: BufferPolicy = "average"

    def __post_init__(self) -> None:
        one_of("buffers", self.buffers, BufferPolicy)
        # A string would be read as its letters; a list comes from YAML.
        settle(self, include=names("include", self.include), exclude=names("exclude", self.exclude))
        settle(self, trainable=flag("trainable", self.trainable))
        if not self.include:
            raise ValueError("`include` must hold at least one pattern, got none: '*' selects everything.")

    def parameters(self, module: nn.Module | Inventory) -> dict[str, nn.Parameter]:
        """The selected floating-point parameters of a module, by canonical name.

        A tensor that has several names is selected if one of them is.

        Args:
            module: A module, or what is known of one already.
        """
        found = _inventory(module)
        if not (chosen := self.chosen(found)):
            some = ", ".join(list(found.parameters)[:5]) or "none"
            raise ValueError(f"{self} matches no parameter of {found.title}; its first parameters are: {some}.")
        self._refuse_unmatched(found)
        return chosen

    def _refuse_unmatched(self, inventory: Inventory) -> None:
        """Checks that every pattern is of something that is there."""
        known = [*inventory.tensors, *inventory.aliases]
        for argument, patterns in (("include", self.include), ("exclude", self.exclude)):
            for pattern in patterns:
                if known and not any(fnmatchcase(name, pattern) for name in known):
                    near = [n for n in known if pattern.strip("*.") in n] if pattern.strip("*.") else []
                    near = near or get_close_matches(pattern, known, 5, 0.3) or known
                    raise ValueError(
                        f"`{argument}` has the pattern {pattern!r}, which matches no parameter of {inventory.title}."
                        f" Patterns are of whole names; near ones are: {', '.join(near[:5])}."
                    )

    def chosen(self, inventory: Inventory) -> dict[str, nn.Parameter]:
        """``parameters``, which may be none.

        Args:
            inventory: What is known of a module.
        """
        return {n: p for n, p in inventory.parameters.items() if self._selects(inventory.names_of(n), p)}

    def pulled_along(self, module: nn.Module | Inventory) -> dict[str, str]:
        """Names that are not selected of tensors that are under another name, with that name.

        Args:
            module: A module, or what is known of one already.
        """
        found = _inventory(module)
        chosen = self.chosen(found)
        names = {name: [n for n in found.names_of(name) if self._names(n)] for name in chosen}
        return {n: names[name][0] for name in chosen for n in found.names_of(name) if n not in names[name]}

    def left_alone(self, module: nn.Module | Inventory) -> list[str]:
        """Names of parameters that would be selected if they could be averaged: packed, quantised, or integers.

        Args:
            module: A module, or what is known of one already.
        """
        found = _inventory(module)
        integers = {name: p for name, p in found.parameters.items() if not is_averaged(p)}
        return [name for name in integers if any(map(self._names, found.names_of(name)))]

    def averaged_buffers(self, module: nn.Module | Inventory) -> dict[str, Tensor]:
        """The buffers that go through the rule.

        Args:
            module: A module, or what is known of one already.
        """
        if self.buffers != "average":
            return {}
        return {name: b for name, b in _inventory(module).buffers.items() if is_averaged(b)}

    def copied_buffers(self, module: nn.Module | Inventory) -> dict[str, Tensor]:
        """The buffers that are copied from the model at each update.

        Args:
            module: A module, or what is known of one already.
        """
        buffers = _inventory(module).buffers
        return {name: b for name, b in buffers.items() if self.buffers != "average" or not is_averaged(b)}

    def _selects(self, names: list[str], parameter: nn.Parameter) -> bool:
        return (
            is_averaged(parameter)
            and (parameter.requires_grad or not self.trainable)
            and any(self._names(name) for name in names)
        )

    def _names(self, name: str) -> bool:
        return any(fnmatchcase(name, pattern) for pattern in self.include) and not any(
            fnmatchcase(name, pattern) for pattern in self.exclude
        )


def _inventory(module: nn.Module | Inventory) -> Inventory:
    return module if isinstance(module, Inventory) else Inventory(module)


def chosen(selection: Selection | None, default: Selection) -> Selection:
    """The selection that was given as ``selection``, or the default where none was.

    Args:
        selection: What the user gave.
        default: What is taken where that is ``None``.

    Raises:
        TypeError: If it is no selection; an empty list or text is none either.
    """
    instance("default", default, Selection)
    return default if selection is None else instance("selection", selection, Selection)


def lora(buffers: BufferPolicy = "copy") -> Selection:
    """Only the adapters of LoRA layers: parameters whose name holds ``lora_``.

    Args:
        buffers: What becomes of floating-point buffers: ``"average"``, ``"copy"`` or ``"recompute"``, as in
            ``Selection``.

    Example:
        >>> lora().include
        ('*lora_*',)
    """
    return Selection(include=("*lora_*",), buffers=buffers)


def without(*patterns: str, buffers: BufferPolicy = "average") -> Selection:
    """Everything but the parameters that match one of the glob patterns.

    Args:
        patterns: Globs over canonical names of parameters.
        buffers: What becomes of floating-point buffers: ``"average"``, ``"copy"`` or ``"recompute"``, as in
            ``Selection``.

    Example:
        >>> without("head.*").exclude
        ('head.*',)
    """
    return Selection(exclude=names("patterns", patterns), buffers=buffers)
