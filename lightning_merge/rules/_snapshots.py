"""Where a window keeps its snapshots: on the device, in host memory, or on disk."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import TypeAlias

import torch

from lightning_merge.weights import Weights, average_dtype, clone, free_bytes, refuse_without_room, size_of, to_devices

Snapshot: TypeAlias = Weights | str
"""The tensors, or the name of the file that holds them."""

_HOST = torch.device("cpu")


class Snapshots(ABC):
    """A place for real copies of weights, in the precision averages are kept in."""

    cure: str
    """What to do when there is no room here."""

    @abstractmethod
    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        """What that many copies take: places in words, bytes needed there, and bytes free there if that is known."""

    @abstractmethod
    def keep(self, weights: Weights, beside: Iterable[Snapshot] = ()) -> Snapshot:
        """Makes a copy, of the same run as the snapshots it will be beside."""

    @abstractmethod
    def read(self, snapshot: Snapshot) -> Weights:
        """Its tensors; not to be written to."""

    @abstractmethod
    def extended(self, snapshot: Snapshot, weights: Weights) -> Snapshot:
        """The snapshot with copies of further tensors."""

    def drop(self, names: Iterable[str]) -> None:
        """Removes files that will not be read again."""
        return

    def name(self, snapshots: Iterable[Snapshot]) -> None:
        """Called when a checkpoint names snapshots: they are kept whatever happens to the run."""
        return

    @abstractmethod
    def load(
        self, snapshots: list[Snapshot], devices: Mapping[str, torch.device], named: Iterable[Snapshot] = ()
    ) -> list[Snapshot]:
        """Snapshots of a saved state, where they belong; ``named`` are others that the checkpoint names."""


class _InMemory(Snapshots):
    def read(self, snapshot: Snapshot) -> Weights:
        assert isinstance(snapshot, dict)
        return snapshot

    def extended(self, snapshot: Snapshot, weights: Weights) -> Snapshot:
        fresh = self.keep(weights)
        assert isinstance(fresh, dict)
        return {**self.read(snapshot), **fresh}

    def load(
        self, snapshots: list[Snapshot], devices: Mapping[str, torch.device], named: Iterable[Snapshot] = ()
    ) -> list[Snapshot]:
        if any(isinstance(snapshot, str) for snapshot in snapshots):
            raise ValueError("the saved window is on disk: go on with `store='disk'` and its `directory`.")
        return [self._place(self.read(snapshot), devices) for snapshot in snapshots]

    @abstractmethod
    def _place(self, snapshot: Weights, devices: Mapping[str, torch.device]) -> Weights:
        """The snapshot where it belongs."""


class OnDevice(_InMemory):
    """Where the weights are."""

    cure = "Choose `store='cpu'` or `store='disk'`, or lower `k`."

    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        needed: dict[torch.device, int] = {}
        for tensor in weights.values():
            needed[tensor.device] = needed.get(tensor.device, 0) + copies * size_of({"": tensor})
        return [(f"on {device}", size, free_bytes(device)) for device, size in needed.items()]

    def keep(self, weights: Weights, beside: Iterable[Snapshot] = ()) -> Weights:
        return clone(weights)

    def _place(self, snapshot: Weights, devices: Mapping[str, torch.device]) -> Weights:
        placed: Weights = to_devices(snapshot, devices)
        return placed


class OnHost(_InMemory):
    """In host memory."""

    cure = "Choose `store='disk'`, or lower `k`."

    def room(self, weights: Weights, copies: int) -> list[tuple[str, int, int | None]]:
        return [("in host memory", copies * size_of(weights), free_bytes(_HOST))]

    def keep(self, weights: Weights, beside: Iterable[Snapshot] = ()) -> Weights:
        # A bare `cpu()` of a tensor that is there already is the tensor itself: the "average" of those is the newest.
        return {name: t.detach().to(_HOST, average_dtype(t), copy=True) for name, t in weights.items()}

    def _place(self, snapshot: Weights, devices: Mapping[str, torch.device]) -> Weights:
        placed: Weights = to_devices(snapshot, _HOST)
        return placed


def check_room(snapshots: Snapshots, weights: Weights, copies: int) -> None:
    """Raises before anything is allocated.

    Raises:
        MemoryError: If that many copies do not fit.
    """
    for place, needed, free in snapshots.room(weights, copies):
        needs = f"a window of {copies - 1} snapshots and one copy to work with needs {needed:,} bytes {place}"
        refuse_without_room(needed, free, needs, snapshots.cure)
