"""SMA in a Trainer."""

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, Walk, WalkParts, batches, differing, of, read, steps, trainer, values
from torch import Tensor

from lightning_merge.callbacks import EMA, SMA


class ScoredParts(WalkParts):
    """``val/score`` is best at 2."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/score", -(self.w.detach() - 2).abs().sum())


def test_mean_counts_the_step_it_starts_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sma, module = SMA("val/w", mode="max", start_step=2), Walk()
    with caplog.at_level("INFO"):
        trainer(tmp_path, [sma], max_steps=5).fit(module, steps(5), steps(1))
    assert float(module.w) == (2 + 3 + 4 + 5) / 4
    assert "SMA 'sma'" in caplog.text
    assert "decay" not in caplog.text, "the share of the first weights is no matter of a decay here"


@pytest.mark.parametrize("beside", [False, True])
def test_the_mean_that_scored_best_is_published_and_saved(tmp_path: Path, beside: bool) -> None:
    sma, module = SMA("val/score", mode="max", start_step=0), of(ScoredParts)()
    others: list[Any] = [EMA(decay=0.5)] if beside else []
    run = trainer(tmp_path, [*others, sma, ModelCheckpoint(tmp_path)], max_epochs=8)
    run.fit(module, steps(1), steps(1))
    # Means of 0..t are t / 2: best after step 4.
    assert float((sma.merged_weights() or {})["w"]) == 2
    assert float(read(str(sma.final_path))["state_dict"]["w"]) == 2
    assert sma.final_metrics["val/score"] == 0
    assert float(module.w) == (2 if not beside else pytest.approx(7.00390625))


def test_sma_resumes_bit_for_bit(tmp_path: Path) -> None:
    def run(folder: str, ckpt: Any = None) -> tuple[SMA, Any]:
        sma, module = SMA("val/loss", start_step=2), Net(norm=True)
        files = ModelCheckpoint(tmp_path / folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        trainer(tmp_path, [sma, files], max_epochs=5).fit(module, batches(4), batches(2), ckpt_path=ckpt)
        return sma, module

    sma, module = run("whole")
    again, resumed = run("again", tmp_path / "whole" / "epoch=2.ckpt")
    assert not differing(values(module), values(resumed))
    assert again.final_metrics == sma.final_metrics


def test_what_sma_cannot_choose_by_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`validate` must be 'merged' or 'both' for SMA"):
        SMA("val/loss", validate="raw")
    with pytest.raises(ValueError, match="`mode` must be"):
        SMA("val/loss", mode="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SMA 'sma' measures by validation"):
        trainer(tmp_path, [SMA("val/loss")], max_epochs=1, limit_val_batches=0).fit(Net(), batches(4))
    with pytest.raises(ValueError, match=r"`monitor` of SMA 'sma' .* got 'val/acc'; it logs: val/loss"):
        trainer(tmp_path, [SMA("val/acc", start_step=0)], max_epochs=1).fit(Net(), batches(4), batches(2))
