"""Which tensors a module has now, and whether that has changed."""

from torch import nn

from lightning_merge.spectral import singular_vectors
from lightning_merge.weights import Inventory


class Watching:
    """Looks the live tensors of a module up.

    Args:
        module: Any.

    Attributes:
        module: The same.
        inventory: Its tensors at the last look.
        watches_training: Whether it matters which parameters require gradients.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.inventory = Inventory(module)
        self.watches_training = False
        self._vectors: tuple[int, set[str]] | None = None
        self._trained: tuple[bool, ...] = ()  # which parameters require gradients

    def has_changed(self, *, before_step: bool = False) -> bool:
        """Looks again: whether any was replaced, added, removed, or, if that matters, frozen or unfrozen.

        Args:
            before_step: Whether one more look comes before the next step, at what only that could make a difference to.
        """
        before_step = before_step and self.watches_training
        changed = self.inventory.refresh(sizes=not before_step)
        if self.watches_training and not before_step:
            trained = tuple([parameter.requires_grad for parameter in self.inventory.parameters.values()])
            changed, self._trained = changed or trained != self._trained, trained
        return changed

    @property
    def singular_vectors(self) -> set[str]:
        """Names of the buffers that spectral normalisation iterates."""
        if self._vectors is None or self._vectors[0] != self.inventory.version:
            self._vectors = self.inventory.version, singular_vectors(self.module)
        return self._vectors[1]
