"""Modules whose forward passes are linear in the weights."""

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import final

import torch
from torch import Tensor, nn

from lightning_merge._checks import instance, names
from lightning_merge._mergeable import named
from lightning_merge.tangent._forward import LinearForward
from lightning_merge.weights import Weights, first_mismatch

KEY = "lightning_merge_linearize"
"""Where checkpoints hold ``w0``."""


@final
class Tangent:
    """What ``linearize`` made of a module, and the way back.

    Args:
        module: The module that was given.
        forwards: The linear forward passes, by the name of the submodule whose own they replace.

    Attributes:
        module: The module that was given.
        parts: Names of the submodules whose forward pass is linear now; ``""`` is the module itself.
    """

    def __init__(self, module: nn.Module, forwards: Mapping[str, LinearForward]) -> None:
        self.module, self.parts = module, tuple(forwards)
        self._forwards = forwards
        for forward in forwards.values():
            forward.install()

    @property
    def is_used(self) -> bool:
        """Whether a forward pass went through one of the parts."""
        return any(forward.is_used for forward in self._forwards.values())

    @property
    def start(self) -> Weights:
        """The weights ``w0``, by the names of the module's parameters; no copies."""
        return {
            _joined(name, key): tensor
            for name, forward in self._forwards.items()
            for key, tensor in forward.start.items()
        }

    def remove(self) -> None:
        """The module computes again what it did before; its weights stay."""
        for forward in self._forwards.values():
            forward.remove()


def linearize(
    module: nn.Module, only: str | list[str] | None = None, start: Mapping[str, Tensor] | None = None
) -> Tangent:
    """Replaces forward passes by ``f(x; w0) + J(x; w0) (w - w0)``, which is linear in the parameters ``w``.

    ``w0`` are the weights at the call. What is trained afterwards is ``w``, in its place and under its names, so
    optimizers, averages and files do not change; but ``w`` alone says nothing: keep ``w0`` (``Tangent.start``) with it.
    Task vectors ``w - w0`` of several fits add up exactly in the outputs. Buffers are the module's own: in train mode
    running statistics follow what ``w0`` makes of the batch. Attention takes the kernel that has forward-mode rules.

    Costs a copy of the weights, 2.1 to 2.3 times the time of a training step, 3.5 to 3.9 times that of a forward pass
    without gradients, and 1.2 to 2.5 times the memory for the backward pass (a small vision transformer and ResNet-8).

    Args:
        module: Any module, neither compiled nor sharded; it is changed, until ``Tangent.remove``.
        only: Globs of submodules that are linearised, each as a whole, and nothing else (partial linearisation); by
            default the module itself.
        start: ``w0`` of an earlier call, by name; by default the weights at this one.

    Returns:
        What it did; ``remove()`` undoes it.

    Raises:
        ValueError: If a pattern matches no submodule with parameters, ``start`` does not fit, or what is to be linear
            is compiled, or linear already.
        NotImplementedError: In a forward pass, if a layer has no forward-mode rule; it is named.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1))
        >>> tangent = linearize(net)
        >>> outputs = []
        >>> for _ in range(3):
        ...     outputs.append(net(torch.ones(1, 2)).item())
        ...     with torch.no_grad():
        ...         _ = [parameter.add_(0.1) for parameter in net.parameters()]
        >>> abs(outputs[0] - 2 * outputs[1] + outputs[2]) < 1e-5  # they lie on a line
        True

    References:
        Ortiz-Jimenez et al., "Task arithmetic in the tangent space", NeurIPS 2023, equation 3. Of adapters alone: Tang
        et al., "Parameter-efficient multi-task model fusion with partial linearization", ICLR 2024.
    """
    instance("module", module, nn.Module, "a module")
    parts = {"": module} if only is None else _chosen(module, names("only", only))
    for name, part in parts.items():
        _refuse(f"`{name}`" if name else "`module`", part)
    known = {_joined(name, key): each for name, part in parts.items() for key, each in part.named_parameters()}
    if start is not None:
        start = named("start", start)
    if start is not None and (difference := first_mismatch(known, start)):
        raise ValueError(f"`start` must be weights of what is linearised: {difference}.")
    values = known if start is None else start
    with torch.inference_mode(False):
        starts = {key: each.detach().clone() for key, each in values.items()}
    return Tangent(
        module,
        {
            name: LinearForward(part, {key: starts[_joined(name, key)] for key, _ in part.named_parameters()}, name)
            for name, part in parts.items()
        },
    )


def _joined(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _chosen(module: nn.Module, patterns: tuple[str, ...]) -> dict[str, nn.Module]:
    able = {name: part for name, part in module.named_modules() if name and next(part.parameters(), None) is not None}
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        matching = [name for name in able if fnmatchcase(name, pattern)]
        if not matching:
            there = ", ".join(f"`{name}`" for name in list(able)[:8])
            raise ValueError(
                f"`only` must match submodules with parameters, and {pattern!r} matches none; there are:"
                f" {there or 'none'}."
            )
        found.update((name, able[name]) for name in matching)
    return {name: part for name, part in found.items() if not any(name.startswith(f"{outer}.") for outer in found)}


def _refuse(title: str, part: nn.Module) -> None:
    if next(part.parameters(), None) is None:
        raise ValueError(f"{title} must have parameters to be linear in, and has none.")
    for each in part.modules():
        if isinstance(each, torch.jit.ScriptModule) or hasattr(each, "_orig_mod"):
            raise ValueError(f"{title} is compiled, whole or in part: linearise what is not.")
        if isinstance(vars(each).get("forward"), LinearForward):
            raise ValueError(f"{title} is linear already, whole or in part: call `remove()` of what was returned then.")
