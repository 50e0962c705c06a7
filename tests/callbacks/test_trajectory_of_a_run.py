"""The checkpoints that a run of ours leaves, as a trajectory."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Walk, steps, trainer

from lightning_merge.callbacks import EMA
from lightning_merge.trajectory import Trajectory


def test_of_our_files_raw_weights_or_published_ones_are_taken(tmp_path):
    module = Walk()
    best = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer(tmp_path, [EMA(decay=0.5), best], max_steps=3).fit(module, steps(3))
    raw = Trajectory.of_run(tmp_path, "step=*.ckpt", weights="raw")
    assert [float(c.tensor("w")) for c in raw] == [1, 2, 3]
    published = Trajectory.of_run(tmp_path, "step=*.ckpt", weights="published")
    assert [float(c.tensor("w")) for c in published] == [0.5, 1.25, 2.125]
    light = ModelCheckpoint(tmp_path / "light", save_weights_only=True)
    trainer(tmp_path, [EMA(decay=0.5), light], max_steps=3).fit(Walk(), steps(3))
    assert len(Trajectory.of_run(tmp_path / "light", "e*.ckpt", weights="published")) == 1
    with pytest.raises(ValueError, match="holds the weights of the average 'ema' only"):
        Trajectory.of_run(tmp_path / "light", "e*.ckpt")
