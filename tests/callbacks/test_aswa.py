"""ASWA in a Trainer: the gate, the rollback, and that measuring candidates leaves nothing behind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, WalkParts, batches, differing, of, read, steps, trainer, values
from torch import Tensor

from lightning_merge.callbacks import ASWA, EMA


class GatedParts(WalkParts):
    """``val/score`` is ``-|w - 3|``; keeps what validation measured, and when."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.validated: list[float] = []

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.validated.append(float(self.w))
        self.log("val/score", -(self.w.detach() - 3).abs().sum())


# Weights at the ends of the epochs, one step each: 2, 4, 10, 3, 2.5.
GROWTH = (2.0, 2.0, 6.0, -7.0, -0.5)


def test_epochs_join_the_mean_if_it_scores_no_worse(tmp_path: Path) -> None:
    module = of(GatedParts)(growth=GROWTH)
    aswa = ASWA("val/score", mode="max", start_epoch=0)
    trainer(tmp_path, [aswa], max_epochs=5).fit(module, steps(1), steps(1))
    # At each epoch end the candidate, then the mean that validation measures; the mean again at the end is known.
    candidates, means = module.validated[0::2], module.validated[1::2]
    assert candidates == pytest.approx([2, 3, 16 / 3, 3, 11.5 / 4])
    assert means == pytest.approx([2, 3, 3, 3, 3])
    assert float(module.w) == 3
    assert (aswa.updates, aswa.score) == (3, 0)
    assert float(aswa.raw_weights()["w"]) == 2.5


def test_hard_updates_measure_the_epoch_alone_too(tmp_path: Path) -> None:
    module = of(GatedParts)(growth=(0.0, 1.0, 2.5, -0.5625, 0.1875))
    aswa = ASWA("val/score", mode="max", start_epoch=0, hard=True)
    trainer(tmp_path, [aswa], max_epochs=5).fit(module, steps(1), steps(1))
    assert float(module.w) == 3.03125  # the mean of 2.9375, which was better alone, and 3.125


def test_lower_can_be_better(tmp_path: Path) -> None:
    class Loss(GatedParts):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val/loss", (self.w.detach() - 3).abs().sum())

    module = of(Loss)(growth=GROWTH)
    aswa = ASWA("val/loss", start_epoch=0)
    trainer(tmp_path, [aswa], max_epochs=5).fit(module, steps(1), steps(1))
    assert float(module.w) == 3
    assert aswa.score == 0


def test_training_and_metrics_are_those_of_a_run_without_it(tmp_path: Path) -> None:
    found = []
    for callbacks in ([], [ASWA("val/loss", start_epoch=0, validate="raw")]):
        torch.manual_seed(0)
        module, files = Net(norm=True), ModelCheckpoint(tmp_path / str(len(callbacks)), monitor="val/loss", mode="min")
        run = trainer(tmp_path, [*callbacks, files], max_epochs=3)
        run.fit(module, batches(4), batches(2))
        raw = callbacks[0].raw_weights() if callbacks else values(module)
        found.append((values(raw), files.best_model_score, len(files.best_k_models)))
    assert not differing(found[0][0], {name: found[1][0][name] for name in found[0][0]})
    assert found[0][1:] == found[1][1:]


def test_statistics_are_measured_under_the_candidate_and_published_with_the_mean(tmp_path: Path) -> None:
    module, aswa = Net(norm=True), ASWA("val/loss", start_epoch=0)
    trainer(tmp_path, [aswa, ModelCheckpoint(tmp_path, monitor="val/loss")], max_epochs=4).fit(
        module, batches(4), batches(2)
    )
    assert aswa.final_metrics["val/loss"] == pytest.approx(aswa.score, rel=1e-5)
    again = Net(norm=True)
    again.load_state_dict(read(str(aswa.final_path))["state_dict"])
    assert trainer(tmp_path).validate(again, batches(2), verbose=False)[0]["val/loss"] == pytest.approx(aswa.score)


@pytest.mark.parametrize("stop", [1, 3])
def test_resumed_run_equals_uninterrupted_run(tmp_path: Path, stop: int) -> None:
    def run(folder: str, ckpt: Any = None) -> tuple[ASWA, Any]:
        aswa, module = ASWA("val/loss", start_epoch=0), Net(norm=True)
        files = ModelCheckpoint(tmp_path / folder, filename="{epoch}", every_n_epochs=1, save_top_k=-1)
        trainer(tmp_path, [aswa, files], max_epochs=5).fit(module, batches(4), batches(2), ckpt_path=ckpt)
        return aswa, module

    aswa, module = run("whole")
    again, resumed = run("again", tmp_path / "whole" / f"epoch={stop}.ckpt")
    assert not differing(values(module), values(resumed))
    assert (again.score, again.updates) == (aswa.score, aswa.updates)


def test_another_average_beside_it_is_measured_as_ever(tmp_path: Path) -> None:
    module, ema = of(GatedParts)(growth=GROWTH), EMA(decay=0.5)
    aswa = ASWA("val/score", mode="max", start_epoch=0)
    trainer(tmp_path, [ema, aswa], max_epochs=5).fit(module, steps(1), steps(1))
    assert float((aswa.merged_weights() or {})["w"]) == 3
    assert float(module.w) == pytest.approx(float((ema.merged_weights() or {})["w"]))


def test_what_cannot_be_decided_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`mode` must be 'min' or 'max', got 'up'"):
        ASWA("val/loss", mode="up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"ASWA 'aswa' measures by validation: give the Trainer a validation loader"):
        trainer(tmp_path, [ASWA("val/loss")], max_epochs=2, limit_val_batches=0).fit(Net(), batches(4))
    with pytest.raises(
        ValueError, match=r"`monitor` of ASWA 'aswa' must be a metric .* got 'val/acc'; it logs: val/loss"
    ):
        trainer(tmp_path, [ASWA("val/acc", start_epoch=0)], max_epochs=2).fit(Net(), batches(4), batches(2))
