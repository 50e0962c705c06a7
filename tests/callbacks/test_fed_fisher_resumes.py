"""FedFisher in a run of a Trainer that is resumed."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, batches, differing, trainer, values
from torch.utils.data import DataLoader

from lightning_merge.branches import FedFisher
from lightning_merge.callbacks import Branching
from lightning_merge.schedules import EveryNSteps

BENDS = [lambda batch: batch, lambda batch: [batch[0] + 0.3 * batch[0].square(), batch[1]]]


class Adam(Net):  # type: ignore[misc, valid-type]
    """It has second moments."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    def fit(folder: str, ckpt_path: Path | None = None) -> Any:
        module = Adam(norm=True)
        checkpoint = ModelCheckpoint(tmp_path / folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        branching = Branching(FedFisher(iterations=50), EveryNSteps(2), 2, augmentations=BENDS)
        data = DataLoader([next(iter(batches(1)))] * 5, batch_size=None)
        trainer(tmp_path, [branching, checkpoint], max_epochs=1).fit(module, data, ckpt_path=ckpt_path)
        assert branching.merges
        return values(module)

    assert not differing(fit("whole"), fit("again", tmp_path / "whole" / "step=3.ckpt"))
