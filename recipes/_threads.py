"""The number of CPU threads of a run."""

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_merge._checks import whole


class CPUThreads(Callback):
    """Runs torch on ``count`` CPU threads during a fit, and restores the previous number afterwards.

    A small network is no faster with more. It is several times slower when another program is busy, as threads wait
    for each other, and its numbers change with their count.

    Args:
        count: At least 1.

    Raises:
        ValueError: If ``count`` is less than 1.
    """

    def __init__(self, count: int = 1) -> None:
        self.count = whole("count", count, 1, 10_000)
        self.before = torch.get_num_threads()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Sets the count."""
        self.before = torch.get_num_threads()
        torch.set_num_threads(self.count)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restores the previous count."""
        torch.set_num_threads(self.before)
