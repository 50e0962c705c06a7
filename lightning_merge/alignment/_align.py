"""Weight matching: the order of units in which one set of weights is closest to another."""

import random
from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from lightning_merge._checks import instance, whole
from lightning_merge._checks import seed as checked_seed
from lightning_merge.alignment._units import Units, first_names, units
from lightning_merge.weights import Weights, first_mismatch, nonfinite


@torch.no_grad()
def align(
    module: nn.Module, weights: Mapping[str, Tensor], to: Mapping[str, Tensor], sweeps: int = 100, seed: int = 0
) -> Weights:
    """The weights with hidden units in the order in which they are closest to others: the same function, another order.

    Maximises ``sum over tensors of <P(weights), to>`` over permutations ``P`` of each group of units, one group after
    the other by an exact assignment, until no group changes (weight matching of Git Re-Basin). Merge it with ``to`` by
    any mean; where networks have BatchNorm, measure its statistics again, and where not, ``calibration.repair`` it.

    Args:
        module: A network of the architecture, see ``units``; only its structure is used.
        weights: Its tensors by name, parameters and buffers.
        to: Those of the other network.
        sweeps: Most passes over all groups; at least 1.
        seed: Of the order of groups in a pass.

    Returns:
        Every tensor of ``weights``; those without a group are the same objects.

    Raises:
        ImportError: Without ``scipy``, which the extra ``search`` brings.
        ValueError: If the two are of different architectures (the first difference is named), hold a NaN or an
            infinity, or the network cannot be followed.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
        >>> one = {name: each.detach() for name, each in net.named_parameters()}
        >>> other = {"0.weight": one["0.weight"][[2, 0, 1]], "0.bias": one["0.bias"][[2, 0, 1]]}
        >>> other |= {"2.weight": one["2.weight"][:, [2, 0, 1]], "2.bias": one["2.bias"]}
        >>> bool((align(net, other, to=one)["0.weight"] == one["0.weight"]).all())
        True

    References:
        Ainsworth, Hayase and Srinivasa, "Git Re-Basin: Merging models modulo permutation symmetries", ICLR 2023,
        algorithm 1.
    """
    instance("weights", weights, Mapping, "tensors by name")
    instance("to", to, Mapping, "tensors by name")
    if find_spec("scipy") is None:
        raise ImportError('Alignment needs scipy: pip install "lightning-merge[search]".')
    sweeps, groups = whole("sweeps", sweeps, 1), units(module)
    _refuse(groups, weights, to)
    trained = {name for name, _ in module.named_parameters()}
    orders = [list(range(group.size)) for group in groups]
    numbers = random.Random(checked_seed("seed", seed))
    for _ in range(sweeps):
        changed = False
        for i in numbers.sample(range(len(groups)), len(groups)):
            found = _best(i, groups, orders, weights, to, trained)
            changed |= found != orders[i]
            orders[i] = found
        if not changed:
            break
    first = first_names(module)
    return {name: _ordered(first.get(name, name), tensor, groups, orders) for name, tensor in weights.items()}


def _best(
    i: int,
    groups: Sequence[Units],
    orders: Sequence[list[int]],
    weights: Mapping[str, Tensor],
    to: Mapping[str, Tensor],
    trained: set[str],
) -> list[int]:
    """The order of a group's units that is closest, while the other groups keep theirs."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]

    group = groups[i]
    likeness = torch.zeros(group.size, group.size, dtype=torch.float64)
    for (name, axis), block in group.axes.items():
        if name in trained:
            moved = _ordered(name, weights[name], groups, orders, except_for=i)
            likeness += _rows(to[name], axis, block) @ _rows(moved, axis, block).T
    order: list[int] = linear_sum_assignment(likeness.numpy(), maximize=True)[1].tolist()
    places = torch.arange(group.size)
    gain = likeness[places, order].sum() - likeness[places, orders[i]].sum()
    return order if gain > 1e-12 * likeness.abs().sum() else orders[i]


def _rows(tensor: Tensor, axis: int, block: int) -> Tensor:
    """A row of numbers for each unit."""
    units_first = tensor.movedim(axis, 0)
    return units_first.reshape(units_first.shape[0] // block, -1).double().cpu()


def _ordered(
    name: str, tensor: Tensor, groups: Sequence[Units], orders: Sequence[list[int]], except_for: int | None = None
) -> Tensor:
    """A tensor with every axis that numbers units in their new order."""
    for i, group in enumerate(groups):
        for (of, axis), block in group.axes.items():
            if of == name and i != except_for and orders[i] != list(range(group.size)):
                order = torch.tensor(orders[i], device=tensor.device)
                places = (order[:, None] * block + torch.arange(block, device=tensor.device)).flatten()
                tensor = tensor.index_select(axis, places)
    return tensor


def _refuse(groups: Sequence[Units], weights: Mapping[str, Tensor], to: Mapping[str, Tensor]) -> None:
    if difference := first_mismatch(to, weights):
        raise ValueError(f"`weights` must be of the architecture of `to`: {difference}.")
    for group in groups:
        for (name, axis), block in group.axes.items():
            if name not in weights or weights[name].shape[axis] != group.size * block:
                found = "is missing" if name not in weights else f"has shape {tuple(weights[name].shape)}"
                raise ValueError(
                    f"`weights` must be of `module`, which has {group.size} units in `{name}`: it {found}."
                )
    for title, each in (("weights", weights), ("to", to)):
        if bad := nonfinite({name: tensor for name, tensor in each.items() if tensor.is_floating_point()}):
            raise ValueError(f"`{title}` must be finite, and `{min(bad)}` holds a NaN or an infinity.")
