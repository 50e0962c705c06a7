"""Whether tensors hold only numbers, asked without waiting for the device that they are on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_merge.weights._precision import is_averaged
from lightning_merge.weights._sizes import norms_of


class Finding:
    """Which tensors hold a NaN or an infinity: it was asked when this was made, and is read when it is needed.

    Of tensors in host memory it is known at once. A CUDA device is not waited for: the answer goes into pinned memory
    when the device gets there, and only who reads it before then waits.

    Args:
        weights: Tensors by name, as they are now. What is written to them afterwards does not matter.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        averaged = _averaged(weights)
        there = {name: t for name, t in averaged.items() if t.device.type == "cuda"}
        here = {name: t for name, t in averaged.items() if name not in there} if there else averaged
        self._names = _read_at_once(here)
        self._asked = [_Asked(group) for group in _by_kind(there)]

    @property
    def is_there(self) -> bool:
        """Whether it can be read without waiting."""
        return all(asked.is_there for asked in self._asked)

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
        sizes = torch._foreach_norm(
            [torch.view_as_real(t) if t.is_complex() else t for t in weights.values()], torch.inf
        )
        fine = torch.stack(sizes).isfinite()
        self._answer = fine.to("cpu", non_blocking=True)  # pinned, since it does not block
        self._arrived: Any = torch.cuda.Event() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
        if self._arrived is not None:  # it is where tensors are fake ones
            self._arrived.record(torch.cuda.current_stream(fine.device))

    @property
    def is_there(self) -> bool:
        return self._arrived is not None and bool(self._arrived.query())

    def names(self) -> set[str]:
        if self._arrived is not None:
            self._arrived.synchronize()
        return {name for name, fine in zip(self._names, self._answer.tolist(), strict=True) if not fine}


@torch.no_grad()
def find_nonfinite(weights: Mapping[str, Tensor]) -> Finding:
    """Asks which tensors hold a NaN or an infinity, without waiting for an answer."""
    return Finding(weights)


@torch.no_grad()
def nonfinite(weights: Mapping[str, Tensor]) -> set[str]:
    """Names of the tensors that hold a NaN or an infinity; waits for the device that they are on."""
    return _read_at_once(_averaged(weights))


def _averaged(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: t for name, t in weights.items() if is_averaged(t) and t.numel()}


def _read_at_once(averaged: Mapping[str, Tensor]) -> set[str]:
    # One number per tensor and one read per dtype and device: a norm of finite numbers can only overflow to infinity,
    # so a finite norm proves the tensor finite and the exact test runs on the rare rest.
    if all(_are_finite(norms) for norms in norms_of(list(averaged.values()))):
        return set()
    return {name for name, t in averaged.items() if not bool(t.isfinite().all())}


def _are_finite(norms: list[Tensor]) -> bool:
    fine = torch.stack(norms).isfinite().all()
    # What is in host memory is read there: nothing has to be waited for.
    return bool(fine.numpy() if fine.device.type == "cpu" else fine)


def _by_kind(weights: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    groups: dict[tuple[torch.dtype, torch.device], dict[str, Tensor]] = {}
    for name, tensor in weights.items():
        groups.setdefault((tensor.dtype, tensor.device), {})[name] = tensor
    return list(groups.values())
