"""What an optimizer remembers per parameter, as something that can be kept, exchanged, copied and averaged.

``optimizer.state`` stays the same dict, since wrappers and schedulers may hold it; only its entries come and go.
"""

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_merge.weights import State, average_dtype, is_averaged


def exchanged(optimizer: Optimizer, state: Mapping[Any, Any]) -> dict[Any, Any]:
    """Puts a state into the optimizer and returns the one it had. Entries move by reference; nothing is copied."""
    before = dict(optimizer.state)
    optimizer.state.clear()
    optimizer.state.update(state)
    return before


def copied(state: Mapping[Any, Any]) -> dict[Any, Any]:
    """A copy with tensors of its own."""
    return {parameter: _tensors(own, lambda t: t.detach().clone()) for parameter, own in state.items()}


def stateful(optimizers: Sequence[Optimizer]) -> list[Optimizer]:
    """The optimizers, and those inside of them, also in lists, that keep a state of their own, as SAM around SGD."""
    found: list[Optimizer] = []
    waiting = list(optimizers)
    while waiting:
        each = waiting.pop(0)
        if not any(each is other or each.state is other.state for other in found):
            found.append(each)
            waiting += [inner for value in vars(each).values() for inner in _optimizers_of(value)]
    return found


def kept_by(module: nn.Module) -> list[Optimizer]:
    """The optimizers that a module and its submodules have as attributes."""
    return [found for each in module.modules() for value in vars(each).values() for found in _optimizers_of(value)]


def _optimizers_of(value: Any) -> Iterator[Optimizer]:
    """The optimizer that it is, or those in a container."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else (value,)
    yield from (each for each in inner if isinstance(each, Optimizer))


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
    groups = [(each, each.param_groups) for each in stateful([optimizer])]
    before = exchanged(optimizer, {})
    try:
        # A copy, since an optimizer may go on with the very tensors that it is handed.
        state = {number: _tensors(own, lambda t: t.clone()) for number, own in saved.items()}
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        return dict(optimizer.state)
    finally:
        for each, own in groups:
            each.param_groups = own  # the very dicts, which schedulers may hold
        exchanged(optimizer, before)


def parts(optimizer: Optimizer) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of an optimizer's state that have their parameter's shape, and single numbers, which count."""
    moments: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, parameter in enumerate(parameters):
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                kind = moments if _is_moment(key, value, parameter) else counts
                kind[f"{number}.{key}"] = value
    return moments, counts


def refuse_without_mean(optimizer: Optimizer) -> None:
    """Checks that every tensor of a state is of the parameter's shape, or a single number.

    Raises:
        ValueError: If one is not: the factors of Adafactor's moments, quantised moments, the history of LBFGS.
    """
    for parameter, own in optimizer.state.items():
        for key, value in own.items() if isinstance(own, Mapping) else ():
            odd = [t for t in tree_leaves(value) if isinstance(t, Tensor) and t.numel() != 1]
            if isinstance(value, Tensor) and _is_moment(key, value, parameter):
                continue
            if odd:
                raise ValueError(
                    f"`optimizer_state` 'average' is for moments of the parameter's shape and for counters, and"
                    f" {type(optimizer).__name__} keeps `{key}` of shape {tuple(odd[0].shape)} and {odd[0].dtype} for a"
                    f" parameter of shape {tuple(getattr(parameter, 'shape', ()))}: factored, quantised, or a history,"
                    " of which no mean is known. Take 'keep' or 'reset'."
                )


def _is_moment(key: Any, value: Tensor, parameter: Any) -> bool:
    """Whether a mean over branches can be taken of it, number by number."""
    alike = isinstance(parameter, Tensor) and value.shape == parameter.shape and key != "step"
    return alike and is_averaged(value)


@torch.no_grad()
def average_(states: Sequence[Mapping[Any, Any]]) -> None:
    """Makes tensors of the parameter's shape the mean over the states that have them, and single numbers the largest.

    The latter are step counters: the same in all branches unless one skipped a step.
    """
    for parameter in dict.fromkeys(parameter for state in states for parameter in state):
        owns = [state[parameter] for state in states if parameter in state]
        if not isinstance(owns[0], MutableMapping):
            continue  # of no parameter: what an optimizer keeps of all
        for key in owns[0]:
            values = [own[key] for own in owns if key in own]
            if not isinstance(values[0], Tensor):
                if isinstance(values[0], int | float):
                    for own in owns:
                        own[key] = max(values)
                continue
            if _is_moment(key, values[0], parameter):
                new = values[0].to(average_dtype(values[0]), copy=True)
                for count, value in enumerate(values[1:], start=2):
                    new.lerp_(value.to(new), 1 / count)
            elif values[0].is_complex():
                continue  # a single one, which counts nothing
            else:
                new = torch.stack([value.to(values[0]) for value in values]).amax(0)
            for value in values:
                value.copy_(new)


def refuse_divided(owner: str, optimizer: Optimizer) -> None:
    """For what needs the state of an optimizer, or its steps of single tensors.

    Raises:
        ValueError: If it keeps its state elsewhere, divided among processes, as ``ZeroRedundancyOptimizer`` does.
    """
    if hasattr(optimizer, "consolidate_state_dict"):
        raise ValueError(
            f"{owner} need an optimizer that steps all parameters in every process, and {type(optimizer).__name__}"
            " divides them and its state among processes. Use the optimizer that it wraps."
        )
