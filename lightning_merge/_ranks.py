"""What all processes of a run have to agree on."""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch.distributed as dist


def several() -> bool:
    """Whether there is more than one process."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first() -> bool:
    """Whether this is the first process, which speaks for all."""
    return not several() or dist.get_rank() == 0


def gathered(value: Any) -> list[Any]:
    """The value of every process, by rank. All must call this."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def agreed(found: Mapping[str, Any]) -> dict[str, Any]:
    """Named values that all processes go on with: of each name that of the first process that has it.

    They are paired by name, and no process waits for one that has fewer of them or has them in another order. All must
    call this.
    """
    together: dict[str, Any] = {}
    for each in gathered(dict(found)):
        together = {**each, **together}
    return together


def settings_of(thing: Any) -> dict[str, str]:
    """The arguments that something was made with, where it keeps them under their names and they can be compared."""
    names = [name for name in signature(type(thing)).parameters if hasattr(thing, name)]
    found = {f"`{name}` of {type(thing).__name__}": repr(getattr(thing, name)) for name in names}
    return {name: value for name, value in found.items() if " at 0x" not in value}  # an address: no two are the same


def check_agreement(fields: Mapping[str, Any], cure: str) -> None:
    """Raises in every process if one of them has other values; names the first field that differs.

    Raises:
        RuntimeError: If they differ.
    """
    everyone = gathered(dict(fields))
    first = everyone[0]
    names = list(dict.fromkeys(name for each in everyone for name in each))
    for name in names:
        for rank, each in enumerate(everyone):
            if each.get(name) != first.get(name):
                raise RuntimeError(
                    f"the processes of this run disagree on {name}: rank 0 has {first.get(name)}, rank {rank} has"
                    f" {each.get(name)}. {cure}"
                )
