"""Statistics with a number for each number of a parameter, as combiners weigh by them."""

from typing import ClassVar

from torch import Tensor

from lightning_merge.combiners._with_statistics import WithStatistics


class WithSquares(WithStatistics):
    """A combiner that weighs each number by squared gradients."""

    kinds: ClassVar[tuple[str, ...]] = ("fisher", "adam")

    def _shape(self, tensor: Tensor) -> tuple[int, ...]:
        return tuple(tensor.shape)

    def _squares(self, task: int | str, name: str, like: Tensor) -> Tensor | None:
        """Squared gradients of a tensor in its precision, on its device; ``None`` if no task has some."""
        found = self._of(task).find(name)
        return None if found is None else found.detach().to(like)
