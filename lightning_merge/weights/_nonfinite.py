"""Whether tensors hold only numbers, asked without waiting for the device that they are on."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_merge.weights._fixed import Fixed, averaged_in
from lightning_merge.weights._sizes import Norms


class Finding:
    """Which tensors hold a NaN or an infinity: it was asked when this was made, and is read when it is needed.

    Of tensors in host memory it is known at once. A CUDA device is not waited for: the answer goes into pinned memory
    when the device gets there, and only who reads it before then waits.

    Args:
        weights: Tensors by name, as they are now. What is written to them afterwards does not matter.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        kept = Fixed.of(weights)
        self._names = _names(kept.at_once, kept.norms)
        self._asked = [_Asked(group) for group in kept.on_a_device]

    @property
    def is_there(self) -> bool:
        """Whether it can be read without waiting."""
        return not self._asked or all(asked.is_there for asked in self._asked)

    def names(self) -> set[str]:
        """The names, for which it waits if it must."""
        for asked in self._asked:
            self._names |= asked.names()
        self._asked = []
        return self._names


class _Asked:
    """A question to a CUDA device about tensors of one dtype on it."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._names = list(weights)
        # The largest magnitude: unlike a norm it does not overflow, so the answer is exact, tensor by tensor.
        real = [torch.view_as_real(t) if t.is_complex() else t for t in weights.values()]
        sizes = torch.stack(torch._foreach_norm(real, torch.inf))
        self._sizes = sizes.to("cpu", non_blocking=True)  # pinned, since it does not block
        self._arrived: Any = torch.cuda.Event() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:  # it is where tensors are fake ones
            self._arrived.record(torch.cuda.current_stream(sizes.device))

    @property
    def is_there(self) -> bool:
        return self._arrived is not None and bool(self._arrived.query())

    def names(self) -> set[str]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return {name for name, size in zip(self._names, self._sizes.tolist(), strict=True) if not math.isfinite(size)}


@torch.no_grad()
def find_nonfinite(weights: Mapping[str, Tensor]) -> Finding:
    """Asks which tensors hold a NaN or an infinity, without waiting for an answer."""
    return Finding(weights)


@torch.no_grad()
def nonfinite(weights: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that hold a NaN or an infinity; waits for the device that they are on."""
    averaged = averaged_in(weights)
    return _names(averaged, Norms(averaged.values()))


def _names(averaged: Mapping[str, Tensor], norms: Norms) -> set[str]:
    # A number per tensor or less, and one read per dtype and device: a norm of finite numbers can only overflow to
    # infinity, so a finite norm proves tensors finite and the exact test runs on the rare rest.
    if norms.are_finite():
        return set()
    return {name for name, t in averaged.items() if not bool(t.isfinite().all())}
