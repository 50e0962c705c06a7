"""Processes that train apart, each its own weights: what is measured, saved and published of them."""

from collections.abc import Callable, Mapping
from typing import final

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_merge import weights
from lightning_merge._ranks import several
from lightning_merge.callbacks._publication._average import Average
from lightning_merge.inventory import Inventory
from lightning_merge.weights import Weights


@final
class Apart:
    """Known by the weights, not by the strategy: hooks of DDP, plug-ins and modules keep gradients apart as well.

    Where parameters differ between processes, an average is the mean of those of all, and raw weights are those of the
    first process, which is the one that writes files. Parts of sharded parameters differ by what they are.

    Args:
        inventory: Of the module.
        interrupted: Whether no process may wait for another any more.
    """

    def __init__(self, inventory: Inventory, interrupted: Callable[[], bool]) -> None:
        self._inventory = inventory
        self._interrupted = interrupted
        self._said = False

    def make_one(self, average: Average) -> None:
        """Makes one average of those of all processes if they differ, before it is published. All must call this."""
        if self._is_alone or not (different := self._different(average.published_weights() or {})):
            return
        self._say(different)
        average.synchronise(different)
        average.forget_statistics()

    def of_first(self, tensors: Weights) -> Weights:
        """Raw weights, those of the first process if they are not the same in all. All must call this."""
        if self._is_alone or not (different := self._different(tensors)):
            return tensors
        self._say(different)
        return {**tensors, **weights.of_first_rank(self._plain(tensors))}

    def rest_of_first(self, merged: Mapping[str, Tensor]) -> Weights:
        """Of the live weights that are not merged, what is to be in place with them. All must call this."""
        if self._is_alone:
            return {}
        live = weights.local(self._inventory.tensors)
        rest = {name: tensor.detach() for name, tensor in live.items() if name not in merged}
        first = self.of_first(rest)
        return {} if first is rest else first

    @property
    def _is_alone(self) -> bool:
        return not several() or self._interrupted()

    def _plain(self, tensors: Mapping[str, Tensor]) -> Weights:
        live = self._inventory.tensors
        return {name: t for name, t in tensors.items() if name in live and not weights.is_sharded(live[name])}

    def _different(self, tensors: Mapping[str, Tensor]) -> list[str]:
        parameters = self._inventory.parameters
        return weights.apart({name: t for name, t in self._plain(tensors).items() if name in parameters})

    def _say(self, different: list[str]) -> None:
        if not self._said:
            self._said = True
            rank_zero_info(
                f"The processes of this run train apart: `{different[0]}` is not the same in all. Averages are"
                " the means of those of all processes, and raw weights that are measured or saved are those of the"
                " first; see docs/strategies.md."
            )
