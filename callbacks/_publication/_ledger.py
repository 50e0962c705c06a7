"""Which weights each metric was measured on: those of the pass in which its entry changed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

RAW = "raw"
"""The name of the set of raw weights."""


class Entry(NamedTuple):
    """Where the value of a metric comes from."""

    holds: str
    """The set of weights that it was measured on."""
    version: tuple[int, int]
    """Of that set, when it was measured."""
    validated: bool
    """Whether a validation measured it, rather than a training step."""


class Ledger:
    """The owner of each entry of ``callback_metrics``.

    No name is interpreted: whatever changed while a set was measured was measured on it, under any name, logged or put
    there by hand. What changed at other times was measured on the weights that train.
    """

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}
        self._entries: dict[str, Entry] = {}
        self.contested: set[str] = set()
        """Metrics that training and validation both log."""
        self._outdated: set[str] = set()  # metrics of which `say_outdated` has spoken

    def __bool__(self) -> bool:
        """Whether a validation has measured anything."""
        return any(entry.validated for entry in self._entries.values())

    def changed(self, metrics: Mapping[str, Any]) -> list[str]:
        """The entries that were written since the last look."""
        return [key for key, value in metrics.items() if key not in self._seen or self._seen[key] is not value]

    def settle(self, metrics: Mapping[str, Any], owner: Entry) -> list[str]:
        """Gives what was written since the last look to an owner; returns the metrics' names."""
        changed = self.changed(metrics)
        for key in changed:
            before = self._entries.get(key)
            if before is not None and before.validated != owner.validated:
                self.contested.add(key)
            self._entries[key] = owner
        self._seen = dict(metrics)
        return changed

    def get(self, key: str) -> Entry | None:
        """Where a metric comes from, if it was ever written."""
        return self._entries.get(key)

    def is_outdated(self, monitor: str | None, version: tuple[int, int]) -> bool:
        """Whether a validation has measured a metric on another version of its set."""
        entry = None if monitor is None else self._entries.get(monitor)
        return entry is not None and entry.validated and entry.version != version

    def say_outdated(self, monitor: str, holds: str) -> None:
        """Says, once per metric, that a file of a set is called by a score that an earlier version of it has."""
        entry = self._entries.get(monitor)
        if entry is not None and entry.validated and entry.holds == holds and monitor not in self._outdated:
            self._outdated.add(monitor)
            rank_zero_info(
                f"A checkpoint is filed under `{monitor}` of an earlier validation, but holds {holds!r} as it is now,"
                " and its label says `measured: false`: Lightning saves at the end of an epoch, or every n steps,"
                " whether or not it was validated. `ModelCheckpoint(save_on_train_epoch_end=False)`, without"
                " `every_n_train_steps`, saves after validations only."
            )

    def keys_of(self, holds: str) -> list[str]:
        """The metrics whose values were measured on a set by a validation."""
        return [key for key, entry in self._entries.items() if entry.holds == holds and entry.validated]

    def copy(self) -> "Ledger":
        """The same, apart from what is written to either from now on."""
        other = Ledger()
        other._seen, other._entries = dict(self._seen), dict(self._entries)
        other.contested, other._outdated = set(self.contested), self._outdated
        return other
