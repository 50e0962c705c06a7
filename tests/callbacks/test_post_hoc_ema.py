"""Post-hoc EMA in a Trainer."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, Walk, batches, differing, steps, trainer, values

from lightning_merge.callbacks import PostHocEMA


def test_any_width_is_made_after_training(tmp_path: Path) -> None:
    ema, module = PostHocEMA(every=10), Walk()
    trainer(tmp_path, [ema], max_steps=100).fit(module, steps(100))
    means = [float(ema.synthesise(sigma)["w"]) for sigma in (0.05, 0.07, 0.10)]
    assert means == sorted(means, reverse=True)
    assert means[2] == pytest.approx(float(module.w), rel=1e-6)
    assert float(ema.synthesise(0.05, step=50)["w"]) == pytest.approx(means[0] / 2, rel=0.02)


def test_post_hoc_averages_resume_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, ckpt: Any = None) -> PostHocEMA:
        ema = PostHocEMA(every=3, directory=tmp_path / "kept")
        files = ModelCheckpoint(tmp_path / folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        trainer(tmp_path, [ema, files], max_epochs=4).fit(Net(norm=True), batches(4), ckpt_path=ckpt)
        return ema

    whole = run("whole")
    again = run("again", tmp_path / "whole" / "epoch=1.ckpt")
    assert not differing(values(whole.synthesise(0.07)), values(again.synthesise(0.07)))


def test_before_the_first_step_there_is_nothing_to_make(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="has averaged nothing yet"):
        PostHocEMA().synthesise(0.07)
