"""Spectral normalisation under merged weights: the singular vectors that its power iteration keeps in buffers."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from lightning_merge.weights import canonical, submodules

ITERATIONS = 50
"""Steps of the power iteration: from the vectors of weights that are near, a fraction of that is enough."""


def singular_vectors(module: nn.Module) -> set[str]:
    """Names of the buffers in which layers with spectral normalisation keep singular vectors, in both forms of torch.

    Example:
        >>> sorted(singular_vectors(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2)))))
        ['0.parametrizations.weight.0._u', '0.parametrizations.weight.0._v']
    """
    found = set()
    for prefix, owner in submodules(module):
        path = f"{prefix}." if prefix else ""
        if isinstance(owner, _SpectralNorm):
            found |= {canonical(f"{path}_u"), canonical(f"{path}_v")}
        for hook in _hooks(owner):
            found |= {canonical(f"{path}{hook.name}_u"), canonical(f"{path}{hook.name}_v")}
    return found


@torch.no_grad()
def iterate_(module: nn.Module, steps: int = ITERATIONS) -> None:
    """Runs the power iteration of each layer with spectral normalisation, in place: ``u <- Wv / |Wv|``, ``v <- W'u /
    |W'u|``.

    The vectors of an average are shorter than 1 and belong to no weights: the norm that they give is too small.

    Args:
        module: With the weights in place that the vectors are to fit.
        steps: At least 1.

    References:
        Miyato et al., "Spectral normalization for generative adversarial networks", ICLR 2018, algorithm 1.
    """
    for _, owner in submodules(module):
        for name in _parametrized(owner):
            _iterate_parametrized(owner, name, steps)
        for hook in _hooks(owner):
            u, v = getattr(owner, f"{hook.name}_u"), getattr(owner, f"{hook.name}_v")
            _normalise(u, v, hook.eps)
            for _ in range(steps):
                hook.compute_weight(owner, do_power_iteration=True)


def _parametrized(owner: nn.Module) -> Iterator[str]:
    for name, chain in getattr(owner, "parametrizations", {}).items():
        if any(isinstance(each, _SpectralNorm) for each in chain):
            yield name


def _iterate_parametrized(owner: Any, name: str, steps: int) -> None:
    chain = owner.parametrizations[name]
    modes = {part: part.training for part in chain.modules()}
    cached, parametrize._cache_enabled = parametrize._cache_enabled, 0
    chain.train()  # the iteration is made as the weight is asked for, in training mode
    try:
        for each in chain:
            if isinstance(each, _SpectralNorm) and hasattr(each, "_u"):
                _normalise(each._u, each._v, each.eps)
        for _ in range(-(-steps // max(1, _per_call(chain)))):
            getattr(owner, name)
    finally:
        parametrize._cache_enabled = cached
        for part, training in modes.items():
            part.training = training


def _per_call(chain: nn.Module) -> int:
    return min(each.n_power_iterations for each in chain.modules() if isinstance(each, _SpectralNorm))


def _normalise(u: torch.Tensor, v: torch.Tensor, eps: float) -> None:
    u.copy_(nn.functional.normalize(u, dim=0, eps=eps))
    v.copy_(nn.functional.normalize(v, dim=0, eps=eps))


def _hooks(owner: nn.Module) -> list[Any]:
    return [hook for hook in owner._forward_pre_hooks.values() if isinstance(hook, SpectralNorm)]
