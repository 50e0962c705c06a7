"""Random number generators saved with the run, so that resuming draws the same numbers."""

import random
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class RandomState(Callback):
    """Saves the random state of torch (CPU and CUDA), numpy and Python in every full checkpoint, and restores it.

    Lightning saves none, so a resumed run draws other numbers for dropout and augmentation. Together with a loader that
    remembers its position (``torchdata``'s ``StatefulDataLoader``, ``num_workers=0``) a run resumed in the middle of an
    epoch equals the uninterrupted one bit for bit. For one process: each rank has its own state and a file is written
    by one of them.

    Raises:
        ValueError: At fit start if there is more than one process.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuses several processes."""
        if stage == "fit" and trainer.world_size > 1:
            raise ValueError(f"RandomState works for one process, got `world_size` {trainer.world_size}.")

    def state_dict(self) -> dict[str, Any]:
        """The current states, as tensors and numbers."""
        version, internal, gauss = random.getstate()
        numpy = np.random.get_state(legacy=False)
        return {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            # As numbers: `torch.load(weights_only=True)` reads no arrays.
            "numpy": {**numpy, "state": {"key": numpy["state"]["key"].tolist(), "pos": int(numpy["state"]["pos"])}},
            "python": [version, list(internal), gauss],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps the states until training starts: what Lightning does before that draws numbers too."""
        self._loaded = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restores what was loaded."""
        if self._loaded is None:
            return
        torch.set_rng_state(self._loaded["torch"])
        if self._loaded["cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(self._loaded["cuda"])
        numpy = self._loaded["numpy"]
        np.random.set_state({**numpy, "state": {**numpy["state"], "key": np.array(numpy["state"]["key"], np.uint32)}})
        version, internal, gauss = self._loaded["python"]
        random.setstate((version, tuple(internal), gauss))
        self._loaded = None
