"""The callback that takes down what a fit goes through, and saves it once."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint

from lightning_merge.callbacks._replay_run._digests import Digests, of_batch, of_state


class Recorder(Checkpoint):
    """Digests before and after every batch; a checkpoint, so that Lightning calls it after all other callbacks.

    Args:
        save_as: The file to save, once.
        epoch: After which epoch, counted from 0.
        batch: After which of its batches, counted from 0; ``None``: when the epoch has ended.
    """

    def __init__(self, save_as: Path | None = None, epoch: int = 0, batch: int | None = None) -> None:
        self.points: dict[str, Digests] = {}
        self._before = 0  # points taken down when the file was written
        self.save_as, self.epoch, self.batch = save_as, epoch, batch

    @property
    def state_key(self) -> str:
        return "lightning_merge.replay"

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Takes down what the batch meets."""
        at = f"before batch {batch_idx} of epoch {trainer.current_epoch}"
        self.points[at] = {**of_state(trainer, pl_module), **of_batch(batch)}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Takes down what it leaves."""
        self.points[f"after batch {batch_idx} of epoch {trainer.current_epoch}"] = of_state(trainer, pl_module)
        if self.batch is not None and (trainer.current_epoch, batch_idx) == (self.epoch, self.batch):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves where it is due."""
        if self.batch is None and trainer.current_epoch == self.epoch:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sees that something was trained after the file.

        Raises:
            ValueError: If nothing was, so that there is nothing to compare.
        """
        if self._before and self._before == len(self.points):
            raise ValueError(
                f"`epoch` must be one after which the run goes on, got {self.epoch}: it ended {list(self.points)[-1]}."
                " Give an earlier one, or let the run be longer."
            )

    def _save(self, trainer: Trainer) -> None:
        if self.save_as is not None:
            self._before = len(self.points)
            trainer.save_checkpoint(self.save_as)
