"""A strategy in which every process, or group of processes, trains a branch of its own."""

from typing import Any

from lightning.pytorch.strategies import DDPStrategy

from lightning_merge.branches import Placement
from lightning_merge.callbacks._lightning._internals import synchronise_within


class BranchStrategy(DDPStrategy):
    """Processes that train branches side by side: gradients are not synchronised, weights are when branches merge.

    For ``Lookaround`` and the other callbacks that train branches, which find it in the Trainer and train one branch
    per process; with a multiple of as many processes, each branch has a group of processes that train it by DDP. With
    ``batches="same"`` all branches get the same batches, with ``batches="own"`` each those of its loader, and with
    ``batches="turns"`` each process its own share of the data. Arguments are those of Lightning's ``DDPStrategy``.

    Raises:
        ValueError: At fit start if no callback trains branches, or their number does not divide that of the processes.

    Example:
        >>> BranchStrategy(process_group_backend="gloo").process_group_backend
        'gloo'
    """

    placement: Placement | None = None
    _whole = False

    def place(self, branches: int, whole: bool) -> None:
        """Divides the processes among branches; the callback calls it when they have found each other.

        Args:
            branches: How many there are.
            whole: Whether the data are divided among the processes of a branch only, not among branches.
        """
        self.placement = Placement(branches)
        self._whole = whole

    def configure_ddp(self) -> None:
        """Leaves the module bare, or wraps it for the processes of its branch alone."""
        if self.placement is None:
            raise ValueError(
                "BranchStrategy trains branches: add a callback that does, such as Lookaround, or use `strategy='ddp'`."
            )
        if self.placement.size > 1:
            synchronise_within(self, self.placement.within)
            super().configure_ddp()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Data is divided among the processes that see different batches."""
        if self.placement is not None and self._whole:
            return {"num_replicas": self.placement.size, "rank": self.placement.place}
        return super().distributed_sampler_kwargs
