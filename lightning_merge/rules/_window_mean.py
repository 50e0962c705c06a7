"""Mean of the latest weights."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, final

import torch
from torch import Tensor

from lightning_merge._checks import one_of, path, settle, whole
from lightning_merge.rules._base import Rule
from lightning_merge.rules._on_disk import OnDisk
from lightning_merge.rules._shares import of_updates
from lightning_merge.rules._snapshots import OnDevice, OnHost, Snapshot, Snapshots, check_room
from lightning_merge.weights import State, Weights, clone, lerp_

Store = Literal["device", "cpu", "disk"]


@final
@dataclass(frozen=True)
class WindowMean(Rule):
    """Uniform mean of the last ``k`` weights taken in; nothing until there are ``k``.

    It keeps ``k`` copies and, once asked for, their mean. The mean is computed from the copies, oldest first, whenever
    the window has moved: a running sum would drift (25 times the error after 2000 updates).

    Args:
        k: Snapshots in the window; at least 1. LAWA's authors take 6, one per epoch. ``k`` times the distance of
            updates is what matters: about 1 % of the run.
        store: Where the copies are: ``"device"`` (where the weights are), ``"cpu"`` (host memory) or ``"disk"``. Of the
            last two the mean is computed in host memory, in the time it takes to read ``k`` copies.
        directory: For ``"disk"``, and only for it: a folder, one file per snapshot. A checkpoint then names files
            instead of holding ``k`` copies. The files of the last two checkpoints are kept along with the window's, so
            up to ``3 * k``; nothing is removed at the end of the run. A file is read-only once a checkpoint names it,
            and what a killed run left beside those goes when the run goes on.

    Raises:
        ValueError: If an argument is outside its range.
        MemoryError: At ``init``, before anything is allocated, if ``k`` copies and one to work with do not fit.
        FileNotFoundError: At ``load`` or ``result``, if files of the window are gone.

    Example:
        >>> import torch
        >>> rule = WindowMean(k=2)
        >>> state = rule.init({"w": torch.tensor(100.0)})
        >>> for value in (4.0, 2.0, 9.0):
        ...     rule.update(state, {"w": torch.tensor(value)})
        ...     print(rule.result(state))
        None
        {'w': tensor(3.)}
        {'w': tensor(5.5000)}

    References:
        Kaddour, "Stop wasting my time! Saving days of ImageNet and BERT training with latest weight averaging" (LAWA),
        2022. Ajroldi et al., "When, where and why to average weights?", ICML 2025 (1 % of the run).
    """

    callback: ClassVar[str] = "LAWA"

    k: int = 6
    store: Store = "device"
    directory: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        settle(self, k=whole("k", self.k, 1))
        one_of("store", self.store, Store)
        if (self.store == "disk") != (self.directory is not None):
            raise ValueError(
                f"`directory` must be given for `store='disk'` and only for it, got {self.directory!r} with"
                f" `store={self.store!r}`."
            )
        if self.directory is not None:
            settle(self, directory=path("directory", self.directory))

    @property
    def keeps_files(self) -> bool:
        return self.store == "disk"

    @property
    def can_be_undone(self) -> bool:
        return self.store == "device"

    @property
    def result_is_near(self) -> bool:
        return self.store == "device"

    def init(self, weights: Weights) -> State:
        check_room(self._place, weights, self.k + 1)
        return {"snapshots": [], "checkpointed": [], "updates": 0}

    def update(self, state: State, weights: Weights) -> None:
        state.pop("cache", None)
        beside = [snapshot for snapshot in _all_snapshots(state) if isinstance(snapshot, str)]
        self._forget(state, max(0, len(state["snapshots"]) + 1 - self.k))
        state["snapshots"].append(self._place.keep(weights, beside))
        state["updates"] += 1

    def stored(self, state: State) -> Weights | None:
        if len(state["snapshots"]) < self.k:
            return None
        if "cache" not in state:
            state["cache"] = self._mean(state["snapshots"][-self.k :])
        mean: Weights = state["cache"]
        return mean

    def shares(self, state: State) -> Tensor | None:
        n = state["updates"]
        return of_updates(n - self.k + 1, n, n, 1.0 / self.k) if len(state["snapshots"]) >= self.k else None

    def extend(self, state: State, weights: Weights) -> None:
        state.pop("cache", None)
        before = state["snapshots"]
        state["snapshots"] = [self._place.extended(snapshot, weights) for snapshot in before]
        self._drop_unused(state, before)

    def save(self, state: State) -> State:
        """Names the window's files instead of holding them, and keeps them until two more checkpoints have been."""
        names = [snapshot for snapshot in state["snapshots"] if isinstance(snapshot, str)]
        self._place.name(names)
        if names and names not in state["checkpointed"][-1:]:
            checkpointed = [*state["checkpointed"], names]
            state["checkpointed"] = checkpointed[-2:]
            self._drop_unused(state, [name for window in checkpointed[:-2] for name in window])
        return super().save(state)

    def load(self, saved: State, devices: Mapping[str, torch.device]) -> State:
        snapshots = self._place.load(saved["snapshots"], devices, _all_snapshots(saved))
        return {"snapshots": snapshots, "checkpointed": list(saved["checkpointed"]), "updates": saved["updates"]}

    @property
    def _place(self) -> Snapshots:
        if self.directory is not None:
            return OnDisk(os.fspath(self.directory))
        return OnHost() if self.store == "cpu" else OnDevice()

    def _mean(self, snapshots: list[Snapshot]) -> Weights:
        mean = clone(self._place.read(snapshots[0]))
        for count, snapshot in enumerate(snapshots[1:], start=2):
            lerp_(mean, self._place.read(snapshot), 1 / count)
        return mean

    def _forget(self, state: State, count: int) -> None:
        """Takes the oldest snapshots out of the window."""
        oldest = state["snapshots"][:count]
        del state["snapshots"][:count]
        self._drop_unused(state, oldest)

    def _drop_unused(self, state: State, snapshots: list[Snapshot]) -> None:
        used = _all_snapshots(state)
        names = {name for name in snapshots if isinstance(name, str)}
        self._place.drop(names.difference(name for name in used if isinstance(name, str)))


def _all_snapshots(state: State) -> list[Snapshot]:
    """Those of the last checkpoints, and those of the window."""
    return [*(name for window in state["checkpointed"] for name in window), *state["snapshots"]]
