"""REPAIR: activations of a merged network given the means and spreads that those of its members have."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from lightning_merge._checks import function, instance, sequence
from lightning_merge._isolation import isolated
from lightning_merge._mergeable import named, several_named
from lightning_merge._moments import Moments, pooled
from lightning_merge.calibration._statistics import batch_norm_layers
from lightning_merge.weights import Weights, canonical, first_mismatch, named_parameters

_Layer = nn.Linear | _ConvNd


@torch.no_grad()
def repair(
    module: nn.Module,
    merged: Mapping[str, Tensor],
    members: Sequence[Mapping[str, Tensor]],
    batches: Sequence[Any],
    forward: Callable[[Any], Any],
) -> Weights:
    """Merged weights whose layers give each channel the mean and the spread that it has in the members (REPAIR).

    ``weight <- weight * s / d`` and ``bias <- (bias - m) * s / d + mean of the members' means``: ``s`` is the mean of
    the members' standard deviations of a channel behind the layer, ``m`` and ``d`` are the merged network's, with the
    layers before it repaired already. Means of far-apart weights have activations of less spread, layer by layer less.
    A layer without a bias is scaled only; a channel that is constant is moved only. As in BatchNorm, what reaches later
    layers is repaired by the batch's own statistics: exact for one batch, and the better the larger batches are.

    For networks without BatchNorm, whose statistics ``recalibrated_statistics`` measures. Every process of a
    distributed run brings batches of its own. Takes a pass over the batches for each member, and one more.

    Args:
        module: The network; it is left as it was.
        merged: Its merged parameters, by name.
        members: Those of the networks that were merged, at least 2, aligned if they come from different starts.
        batches: Training batches, at least one; they are read several times.
        forward: Runs the module on one batch.

    Returns:
        The merged tensors, those of linear layers and convolutions repaired; transposed convolutions are as they were.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is no batch, are fewer than 2 members, names or shapes differ, the module has BatchNorm
            layers, or no linear layer or convolution that batches reach.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> one, two = ({"weight": torch.tensor([[w]]), "bias": torch.tensor([0.0])} for w in (2.0, -4.0))
        >>> merged = {name: (one[name] + two[name]) / 2 for name in one}
        >>> batches = [torch.tensor([[-1.0], [1.0]])]
        >>> repair(net, merged, [one, two], batches, net)["weight"]  # -1, of a spread of 1 that should be 3
        tensor([[-3.]])

    References:
        Jordan et al., "REPAIR: REnormalizing permuted activations for interpolation repair", ICLR 2023, section 4.
    """
    instance("module", module, nn.Module, "a module")
    merged, members = named("merged", merged), several_named("members", members)
    batches = sequence("batches", batches, "a sequence of batches, which are read several times")
    function("forward", forward)
    live = {name: each for name, each in named_parameters(module).items() if name in merged}
    layers = _layers(module, merged)
    _refuse(module, merged, members, batches)
    with isolated(module), _put_back(live):
        seen = []
        for member in members:
            _put(live, member)
            seen.append(_measured(layers, batches, forward))
        _put(live, merged)
        wanted = {name: _mean([each[name] for each in seen]) for name in seen[0]}
        found = _measured(layers, batches, forward, wanted)
    return {**merged, **_folded(merged, wanted, found)}


def _refuse(
    module: nn.Module, merged: Mapping[str, Tensor], members: Sequence[Mapping[str, Tensor]], batches: Sequence[Any]
) -> None:
    if len(members) < 2:
        raise ValueError(f"`members` must hold at least 2 sets of weights, got {len(members)}.")
    for i, member in enumerate(members, 1):
        if difference := first_mismatch(merged, {name: each for name, each in member.items() if name in merged}):
            raise ValueError(f"member {i} of `members` is another model than `merged`: {difference}.")
    if not len(batches):
        raise ValueError("`batches` must hold at least one batch, got none.")
    if norms := batch_norm_layers(module):
        raise ValueError(
            f"`module` must have no BatchNorm layers, and has `{next(iter(norms))}`: measure their statistics instead"
            " (`calibration.recalibrated_statistics`)."
        )


def _layers(module: nn.Module, merged: Mapping[str, Tensor]) -> dict[str, _Layer]:
    found = {
        canonical(name): part
        for name, part in module.named_modules()
        if isinstance(part, _Layer)
        and not getattr(part, "transposed", False)  # their first axis is that of inputs
        and _tensor(canonical(name), "weight") in merged
    }
    if not found:
        raise ValueError("`merged` must hold weights of linear layers or convolutions of `module`, and holds none.")
    return found


def _tensor(layer: str, name: str) -> str:
    return f"{layer}.{name}" if layer else name


@contextmanager
def _put_back(live: Mapping[str, Tensor]) -> Iterator[None]:
    before = {name: each.detach().clone() for name, each in live.items()}
    try:
        yield
    finally:
        _put(live, before)


def _put(live: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    for name, each in live.items():
        each.detach().copy_(weights[name])


def _measured(
    layers: Mapping[str, _Layer],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    wanted: Mapping[str, tuple[Tensor, Tensor]] | None = None,
) -> dict[str, Moments]:
    """The moments behind each layer that is reached; with what is wanted, later layers see it of those before them."""
    seen: dict[str, Moments] = {}

    def measure(name: str, layer: _Layer, output: Tensor) -> Tensor | None:
        last = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
        rows = output.movedim(last, 1) if output.dim() > 1 else output[None]
        batch = Moments.of(rows)
        seen[name] = seen[name].joined(batch) if name in seen else batch
        if wanted is None:
            return None
        scale, shift = _change(wanted[name], batch if batch.count > 1 else seen[name])
        ones = [1] * (rows.dim() - 2)
        moved = rows * scale.to(rows).view(-1, *ones)
        if layer.bias is not None:
            moved = moved + shift.to(rows).view(-1, *ones)
        return moved.movedim(1, last) if output.dim() > 1 else moved[0]

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = layer.register_forward_hook(lambda layer, _, output, name=name: measure(name, layer, output))
            hooks.callback(hook.remove)
        for batch in batches:
            forward(batch)
    if not seen:
        raise ValueError("`forward` must call linear layers or convolutions of `module`, and called none.")
    return pooled(seen, None)


def _mean(each: Sequence[Moments]) -> tuple[Tensor, Tensor]:
    """Of means and of standard deviations."""
    means = torch.stack([moments.mean for moments in each]).mean(0)
    return means, torch.stack([moments.variance(unbiased=False).sqrt() for moments in each]).mean(0)


def _change(wanted: tuple[Tensor, Tensor], found: Moments) -> tuple[Tensor, Tensor]:
    """Factor and summand that give a channel the mean and the spread that are wanted."""
    deviation = found.variance(unbiased=False).sqrt()
    scale = torch.where(deviation > 0, wanted[1] / deviation, 1.0)
    return scale, wanted[0] - scale * found.mean


def _folded(
    merged: Mapping[str, Tensor], wanted: Mapping[str, tuple[Tensor, Tensor]], found: Mapping[str, Moments]
) -> Weights:
    result: Weights = {}
    for layer, moments in found.items():
        scale, shift = _change(wanted[layer], moments)
        weight, bias = merged[_tensor(layer, "weight")], merged.get(_tensor(layer, "bias"))
        wide = scale.to(weight.device)
        result[_tensor(layer, "weight")] = (weight * wide.view(-1, *[1] * (weight.dim() - 1))).to(weight)
        if bias is not None:
            result[_tensor(layer, "bias")] = (bias * wide + shift.to(bias.device)).to(bias)
    return result
