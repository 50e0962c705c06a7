"""What an optimizer remembers per parameter, as something that can be kept, exchanged, copied and averaged.

``optimizer.state`` stays the same dict, since wrappers and schedulers may hold it; only its entries come and go.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from lightning_merge.weights import State


def exchanged(optimizer: Optimizer, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Puts a state into the optimizer and returns the one it had. Entries move by reference; nothing is copied."""
    before = dict(optimizer.state)
    optimizer.state.clear()
    optimizer.state.update(state)
    return before


def copied(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy with tensors of its own."""
    return {parameter: _tensors(own, lambda t: t.detach().clone()) for parameter, own in state.items()}


def _tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return tree_map_only(Tensor, change, value)


def packed(optimizer: Optimizer, state: Mapping[Any, Any]) -> State:
    """A state as the optimizer itself saves it: by the number of the parameter instead of the parameter."""
    before = exchanged(optimizer, state)
    try:
        return dict(optimizer.state_dict()["state"])
    finally:
        exchanged(optimizer, before)


def unpacked(optimizer: Optimizer, saved: State) -> dict[Any, Any]:
    """The state that ``packed`` gave, on the devices and in the precision that the optimizer wants."""
    groups = optimizer.param_groups
    before = exchanged(optimizer, {})
    try:
        # A copy, since an optimizer may go on with the very tensors that it is handed.
        state = {number: _tensors(own, lambda t: t.clone()) for number, own in saved.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return dict(optimizer.state)
    finally:
        optimizer.param_groups = groups  # the very dicts, which schedulers may hold
        exchanged(optimizer, before)


def parts(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of an optimizer's state that have their parameter's shape, and the others, which count."""
    moments: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                kind = moments if value.shape == parameter.shape and value.is_floating_point() else counts
                kind[f"{number}.{key}"] = value
    return moments, counts


@torch.no_grad()
def average_(states: Sequence[Mapping[Any, Any]]) -> None:
    """Makes tensors of the parameter's shape the mean over the states that have them, and all else the largest.

    The rest are step counters: the same in all branches unless one skipped a step.
    """
    for parameter in dict.fromkeys(parameter for state in states for parameter in state):
        owns = [state[parameter] for state in states if parameter in state]
        for key in owns[0]:
            values = [own[key] for own in owns if key in own]
            if isinstance(values[0], Tensor) and values[0].shape == parameter.shape and values[0].is_floating_point():
                mean = values[0].to(torch.promote_types(values[0].dtype, torch.float32), copy=True)
                for count, value in enumerate(values[1:], start=2):
                    mean.lerp_(value.to(mean), 1 / count)
                for value in values:
                    value.copy_(mean)
            elif isinstance(values[0], Tensor):
                largest = torch.stack([value.to(values[0]) for value in values]).amax(0)
                for value in values:
                    value.copy_(largest)
            elif isinstance(values[0], int | float):
                for own in owns:
                    own[key] = max(values)
