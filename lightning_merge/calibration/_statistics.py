"""Measuring the statistics of BatchNorm layers again, after their weights were merged."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from lightning_merge._checks import function, instance
from lightning_merge._isolation import isolated
from lightning_merge._moments import Moments, pooled, widest
from lightning_merge.weights import Weights, average_dtype, canonical, submodules

_NOMINAL = 2**20
"""Values that a batch counts for in a scripted layer, which does not say how many there were."""


def batch_norm_layers(module: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm layers of a module that keep running statistics, by canonical name; shared ones appear once.

    Every kind: 1d to 3d, lazy ones, ``SyncBatchNorm``, timm's ``BatchNormAct2d``, and those inside of what
    ``torch.jit.script`` made. In a module in train mode, a layer in eval mode is one that the user froze: training
    itself normalises by its statistics, so it is left out.

    Args:
        module: Any module; it is not changed.

    Example:
        >>> list(batch_norm_layers(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
        ['1']
    """
    instance("module", module, nn.Module, "a module")
    found: dict[str, nn.Module] = {}
    for name, layer in submodules(module):
        if (
            _is_batch_norm(layer)
            and layer.running_mean is not None
            and (layer.training or not module.training)
            and layer not in found.values()
        ):
            found[canonical(name)] = layer
    return found


def _is_batch_norm(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) or (
        _is_scripted(layer)
        and str(layer.original_name).startswith("BatchNorm")
        and hasattr(layer, "running_mean")
        and (hasattr(layer, "momentum") or bool(_traced(layer, "training")))
    )


def _traced(layer: Any, argument: str) -> Any:
    """What ``torch.jit.trace`` made a constant of: a layer traced in eval mode is frozen for good."""
    node = layer.graph.findNode("aten::batch_norm")
    return None if node is None else node.inputsAt({"training": 5, "momentum": 6}[argument]).toIValue()


def _is_scripted(layer: nn.Module) -> bool:
    return isinstance(layer, torch.jit.ScriptModule)


def recalibrated_statistics(
    module: nn.Module,
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    group: dist.ProcessGroup | None = None,
) -> Weights:
    """Mean and unbiased variance of what reaches each BatchNorm layer, over all values of all batches.

    Unlike in ``torch.optim.swa_utils.update_bn``, a batch counts by its size, and variance between batches counts.

    During the pass every layer is in eval mode (dropout is off), but BatchNorm layers normalise by the statistics of
    their batch, as in training. Random numbers come from a fixed seed. The module is left as it was, also after an
    exception: modes, parameters, gradients, buffers, torchmetrics metrics, plain attributes, random states. Beside a
    copy of the buffers, of the metrics' states and of what else the forward pass writes to, and what it needs itself,
    this takes 64 MB.

    A layer inside of what ``torch.jit.script`` made cannot be looked into: it is run in train mode, and there the mean
    over batches of their means, and of their variances with that of the means, is taken.

    Under ``torch.distributed`` every process of the group must call this. Each brings batches of its own, as many as
    it likes (as many as the others if there is a ``SyncBatchNorm``), and all get the statistics of all batches.

    Args:
        module: The module, with the merged weights in place.
        batches: Training batches; they are iterated under the fixed seed.
        forward: Runs the module on one batch, on the device and in the precision of training.
        group: Processes to pool over; all of them by default.

    Returns:
        New tensors for ``<layer>.running_mean`` and ``<layer>.running_var``. A layer that no batch reached is left out.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If there is a layer to measure but no batch.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> batches = [torch.tensor([[0.0], [2.0], [4.0], [6.0]]), torch.tensor([[10.0], [14.0]])]
        >>> recalibrated_statistics(layer, batches, layer)
        {'running_mean': tensor([6.]), 'running_var': tensor([27.2000])}

    References:
        Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979.
    """
    if isinstance(batches, str):
        raise TypeError(f"`batches` must be batches to iterate over, got {batches!r}.")
    instance("batches", batches, Iterable, "batches to iterate over")
    function("forward", forward)
    if group is not None:
        instance("group", group, dist.ProcessGroup, "a group of processes")
    layers = {name: layer for name, layer in batch_norm_layers(module).items() if _has_run(layer)}
    if not layers:
        return {}
    result: Weights = {}
    with isolated(module):
        seen = {name: Moments.none(_running_mean(layer)) for name, layer in layers.items()}
        count = _run(layers, seen, batches, forward, group)
        reached = {name: moments for name, moments in pooled(seen, group).items() if moments.count}
        if not reached and not count:
            raise ValueError(
                f"`batches` is empty, but {type(module).__name__} has BatchNorm layers to measure"
                f" (`{next(iter(layers))}`): give at least one training batch, or choose `Selection(buffers='copy')`."
            )
        for name, moments in reached.items():
            prefix = f"{name}." if name else ""
            dtype = average_dtype(_running_mean(layers[name]))
            result[f"{prefix}running_mean"] = moments.mean.to(dtype)
            result[f"{prefix}running_var"] = moments.variance(unbiased=True).to(dtype)
    return result


def _run(
    layers: Mapping[str, nn.Module],
    seen: dict[str, Moments],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
    group: dist.ProcessGroup | None,
) -> int:
    """Runs every batch, adding what reaches each layer to ``seen``; the number of batches."""
    count = 0
    with ExitStack() as hooks:
        scripted = {name: layer for name, layer in layers.items() if _is_scripted(layer)}
        for name in layers.keys() - scripted.keys():
            hook = layers[name].register_forward_pre_hook(_measurement(seen, name, group), with_kwargs=True)
            hooks.callback(hook.remove)
        for batch in batches:
            _begin_batch(scripted)
            forward(batch)
            _end_batch(scripted, seen)
            count += 1
    return count


def _begin_batch(scripted: Mapping[str, Any]) -> None:
    """In train mode the layer writes to its own statistics, which begin at 0. They are put back at the end."""
    for layer in scripted.values():
        layer.training = True
        with torch.no_grad():
            for tensor in (layer.running_mean, layer.running_var, layer.num_batches_tracked):
                tensor.zero_()


def _end_batch(scripted: Mapping[str, Any], seen: dict[str, Moments]) -> None:
    for name, layer in scripted.items():
        layer.training = False
        calls = int(layer.num_batches_tracked)
        momentum = layer.momentum if hasattr(layer, "momentum") else _traced(layer, "momentum")
        share = 1.0 if momentum is None else 1 - (1 - momentum) ** calls
        if calls and share:
            wide = widest(layer.running_mean.device)
            mean, variance = (tensor.to(wide) / share for tensor in (layer.running_mean, layer.running_var))
            seen[name] = seen[name].joined(Moments(_NOMINAL, mean, variance * (_NOMINAL - 1)))


def _has_run(layer: Any) -> bool:
    return not is_lazy(layer.running_mean)


def _running_mean(layer: Any) -> Tensor:
    assert layer.running_mean is not None
    mean: Tensor = layer.running_mean
    return mean


def _measurement(
    seen: dict[str, Moments], name: str, group: dist.ProcessGroup | None
) -> Callable[[_BatchNorm, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook that adds the input to ``seen`` and makes the layer normalise by this batch.

    The layer is in eval mode and is handed the statistics of the batch. Train mode would do the same, but it also
    counts the batch and refuses a single value per channel.
    """

    @torch.no_grad()  # the forward pass may need gradients, its statistics do not
    def measure(layer: _BatchNorm, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values: Tensor = args[0] if args else next(iter(kwargs.values()))
        batch = Moments.of(values) if values.numel() else Moments.none(_running_mean(layer))
        if batch.count:
            seen[name] = seen[name].joined(batch)
        if isinstance(layer, nn.SyncBatchNorm):
            batch = pooled({name: batch}, layer.process_group if group is None else group)[name]
        if batch.count == 1:
            batch = seen[name]  # one value has no variance; what was seen so far is the next best
        if batch.count:
            # Assigned, not copied: what the layer held is not written to.
            mean = _running_mean(layer)
            layer.running_mean = batch.mean.to(mean)
            layer.running_var = batch.variance(unbiased=False).to(mean)

    return measure
