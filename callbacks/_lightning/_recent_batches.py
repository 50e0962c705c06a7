"""The last training batches, kept for measuring BatchNorm statistics again."""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info

from lightning_merge.callbacks._lightning._batch_copies import BatchCopy, is_plain


class RecentBatches:
    """Copies of the most recent training batches in host memory, up to a number of batches and of bytes.

    They stand in for a second pass over the training loader, which would consume random numbers, disturb a loader with
    persistent workers, and cost an epoch.

    Args:
        kept: Batches that are kept already, oldest first.
        batches: Batches to keep; at least 1.
        bytes: Most memory they may take. The newest batch is always kept, whatever its size.

    Attributes:
        is_needed: Whether there is anything to measure, as far as one can tell before a batch is trained on.
        trial: Called with the first batch that was trained on, once, to find out whether it can be used at all.
        way: How the module's step runs on them outside training, once that is known.
        in_eval: Names of the submodules that training leaves in eval mode, once these are known.
        fetched: What gives the batch that was trained on, where only ``training_step`` knows it beforehand.
    """

    def __init__(self, kept: Iterable[Any] = (), *, batches: int = 32, bytes: int = 256 * 2**20) -> None:
        self._kept: deque[BatchCopy] = deque(map(BatchCopy.of, kept), maxlen=batches)
        self.bytes = bytes
        self.is_needed: Callable[[], bool] = _always
        self.trial: Callable[[BatchCopy], None] | None = None
        self.way: Any = None
        self.in_eval: frozenset[str] | None = None
        self.fetched: Callable[[], Any] | None = None
        self._held: BatchCopy | None = None
        self._last: BatchCopy | None = None  # of the batch that is being trained on, once it is kept
        self._holds = False
        self._only_to_try = False
        self._said = False

    @classmethod
    def restored(cls, saved: Any) -> "RecentBatches":
        """Those of a file, as ``saved`` gave them."""
        if not isinstance(saved, dict):
            return cls(saved)
        recent = cls()
        recent._kept.extend(map(BatchCopy.of, saved["batches"]))
        for kept, on_host in zip(recent._kept, saved["on_host"], strict=True):
            kept.on_host = on_host
        return recent

    def beside(self) -> "RecentBatches":
        """The same batches, kept once, for another use, whose step may run in another way."""
        other = RecentBatches()
        other._kept, other.fetched = self._kept, self.fetched
        return other

    @property
    def batches(self) -> list[Any]:
        """The batches, oldest first; whoever may write to one takes a copy of it from ``on``."""
        for kept in self._kept:
            kept.way.wait()
        return [kept.batch for kept in self._kept]

    def on(self, device: torch.device, most: int | None = None) -> list[Callable[[], Any]]:
        """What makes a copy of each batch as it was trained on, oldest first, of the ``most`` newest ones."""
        kept = list(self._kept)
        newest = kept if most is None else kept[len(kept) - most :]
        return [partial(each.on, device) for each in newest]

    def saved(self) -> Any:
        """What a checkpoint holds of them: plain data that ``torch.load(weights_only=True)`` reads, or nothing."""
        strange = next((batch for batch in self.batches if not is_plain(batch)), None)
        if strange is not None:
            if not self._said:
                self._said = True
                rank_zero_info(
                    f"Batches for measuring BatchNorm statistics stay out of checkpoints: a batch ({_kinds(strange)})"
                    " is not plain tensors, numbers and strings in dicts, lists and tuples, and a file with it would"
                    " not load with `weights_only=True`. A resumed run collects batches again."
                )
            return []
        if any(any(kept.on_host) for kept in self._kept):
            return {"batches": self.batches, "on_host": [kept.on_host for kept in self._kept]}
        return self.batches

    def hold(self, batch: Any, *, only_to_try: bool = False, again: bool = False) -> None:
        """Copies a batch that is about to be trained on, since the step may change it in place.

        Args:
            batch: The batch, on the device that it is trained on.
            only_to_try: Whether it is not to be kept, but only to be tried if none has been yet.
            again: Whether it is the batch that was kept last, for another branch, so that one copy does.

        Raises:
            ValueError: If it holds something that cannot be copied.
        """
        if not again:
            self._last = None
        if (only_to_try and self.trial is None) or not self.is_needed():
            return
        self._only_to_try = only_to_try
        self._holds = self.fetched is not None or batch is not None
        self._held = None
        if self._holds and self.fetched is None:
            self._held = self._last if again and self._last is not None else BatchCopy.of(batch)

    def keep(self) -> None:
        """Keeps the held batch, now that it was trained on: a resumed run trains again on one that was not."""
        if not self._holds:
            return
        held, self._held, self._holds = self._held, None, False
        if held is None:
            if self.fetched is None:
                return
            held = BatchCopy.of(self.fetched())
        # After the step of training itself: what fails there as well is no matter of being run outside it.
        self._try(held)
        if self._only_to_try:
            return
        self._last = held
        self._kept.append(held)
        while len(self._kept) > 1 and sum(kept.size for kept in self._kept) > self.bytes:
            self._kept.popleft()

    def try_now(self, batch: Any) -> None:
        """Tries the user's step on a batch before it is trained on, unless it has been tried."""
        if self.trial is not None:
            self._try(BatchCopy.of(batch))

    def _try(self, copy: BatchCopy) -> None:
        if self.trial is not None:
            trial, self.trial = self.trial, None
            trial(copy)


def _kinds(batch: Any) -> str:
    """The class of a batch, and of what is in it if it is a container."""
    items = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, list | tuple) else ()
    inner = sorted({type(item).__name__ for item in items if not is_plain(item)})
    return type(batch).__name__ + (f" of {', '.join(inner)}" if inner else "")


def _always() -> bool:
    return True
