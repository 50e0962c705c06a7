"""Parameters that are not trained, and that steps write to all the same: those of a momentum teacher."""

from collections.abc import Mapping
from operator import attrgetter
from typing import final

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_merge import weights
from lightning_merge.branches import Branches
from lightning_merge.branches._watched import are_the_same
from lightning_merge.weights import Weights

_LARGE = 256 * 2**20
"""Bytes of parameters of which copies are made, so that branches may have their own."""
_VERSION = attrgetter("_version")


@final
class Frozen:
    """Notices that a turn has written to parameters that do not require gradients, and branches them.

    Args:
        branches: The branches.
        title: What messages call them.
    """

    def __init__(self, branches: Branches, title: str) -> None:
        self._branches = branches
        self._title = title
        self._looked_at: tuple[int, int] | None = None
        self._frozen: Mapping[str, Tensor] = {}
        self._versions: list[int] = []
        self._copies: Weights = {}
        self._said = False

    def look(self) -> None:
        """Before the turns of a batch: finds them, and takes what hooks have written since for what they are."""
        branches = self._branches
        now = branches.inventory.version, len(branches.parameters)
        if now != self._looked_at:
            self._looked_at = now
            others = {n: p for n, p in branches.inventory.parameters.items() if n not in branches.parameters}
            frozen = {n: p for n, p in others.items() if not p.requires_grad and branches.could_be(n)}
            if not are_the_same(list(frozen.values()), list(self._frozen.values())):
                self._frozen, self._versions = frozen, []
        if (versions := self._read()) != self._versions:
            if self._versions:
                self._say(self._changed(versions), "hooks between the turns", "all branches share them")
            self._versions = versions
            is_small = sum(p.nbytes for p in self._frozen.values()) <= _LARGE
            self._copies = weights.copies(dict(self._frozen)) if is_small else {}

    def written(self) -> Weights:
        """After a turn: what it has written to, as it was before."""
        if (versions := self._read()) == self._versions:
            return {}
        names = self._changed(versions)
        self._versions = versions
        own = "each branch has its own from here on, and they are merged"
        self._say(names, "steps", own if self._copies else "all branches share them")
        return {n: self._copies[n] for n in names if n in self._copies}

    def _changed(self, versions: list[int]) -> list[str]:
        names = [n for n, now, was in zip(self._frozen, versions, self._versions, strict=True) if now != was]
        return [n for n in names if not self._frozen[n].requires_grad]  # what was unfrozen is branched anyway

    def _say(self, names: list[str], who: str, whose: str) -> None:
        if names and not self._said:
            self._said = True
            rank_zero_info(
                f"{self._title}: {who} write to {len(names)} frozen parameters, `{names[0]}` first, and {whose}."
                " `selection=` decides which parameters are branched, whatever trains."
            )

    def _read(self) -> list[int]:
        return list(map(_VERSION, self._frozen.values()))
