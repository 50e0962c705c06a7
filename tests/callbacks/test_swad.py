"""SWAD in a real Trainer: its published numbers, and that it decides on the raw weights."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import Net, Walk, batches, differing, read, steps, trainer, validation
from torch import Tensor

from lightning_merge.callbacks import EMA, LAWA, SWAD

VALLEY = [2.0, 1.5, 1.2, 1.0, 0.9, 0.8, 0.7, 0.75, 0.8, 0.85, 0.9, 0.92, 0.95, 0.96]
VALLEY += [0.97, 0.98, 0.99, 1.0, 1.01, 1.02, 1.03, 1.04]


class Scripted(Walk):
    """After step k + 1 the weight is k; the validations score as a script says."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__(start=-1.0)
        self.scores = iter(scores)

    def on_validation_epoch_start(self) -> None:
        self.score = next(self.scores, None) or self.score  # the final mean is measured when the script is over

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.score)


def walk(tmp_path: Path, scores: list[float], swad: SWAD, stride: int = 1) -> Any:
    run = trainer(tmp_path, [swad], max_epochs=len(scores), precision="64-true")
    module = Scripted(scores)
    run.fit(module, steps(stride), steps(1))
    return run, module


@pytest.mark.parametrize(
    ("preset", "evaluations", "expected"),
    [
        ("intended", 22, 9.5),
        ("official", 22, 9 + 2 / 11),
        ("paper", 22, 10.0),
        ("intended", 14, 9.0),
        ("official", 14, 8.7),
        ("paper", 14, 9.5),
        ("intended", 4, 3.0),  # never converged: the last segment
        ("official", 4, 3.0),
        ("paper", 4, 1.5),  # never converged: everything
    ],
)
def test_swad_in_a_trainer_equals_the_published_numbers(
    preset: Any, evaluations: int, expected: float, tmp_path: Path
) -> None:
    swad = SWAD("val/loss", preset=preset)
    run, module = walk(tmp_path, VALLEY[:evaluations], swad)
    assert module.w.item() == pytest.approx(expected, abs=1e-12)
    assert run.global_step == min(evaluations, 21)  # the valley is over at the 21st evaluation, and training stops


@pytest.mark.parametrize(("preset", "expected"), [("intended", 10.0), ("official", 10.0), ("paper", 5.5)])
def test_swad_that_never_converges_with_three_steps_per_evaluation(
    preset: Any, expected: float, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    swad = SWAD("val/loss", preset=preset)
    _, module = walk(tmp_path, VALLEY[:4], swad, stride=3)
    assert module.w.item() == pytest.approx(expected, abs=1e-12)
    assert "no score was the lowest" in caplog.text


def test_swad_goes_on_after_the_valley_if_it_may(tmp_path: Path) -> None:
    swad = SWAD("val/loss", stop=False)
    run, module = walk(tmp_path, VALLEY, swad)
    assert run.global_step == 22
    assert module.w.item() == pytest.approx(9.5, abs=1e-12)


def test_a_score_that_is_not_a_number_never_converges(tmp_path: Path) -> None:
    swad = SWAD("val/loss")
    walk(tmp_path, [torch.nan, 1.0, torch.nan, 1.0], swad)
    assert swad.evaluations == 4
    assert swad.final_metrics.keys() == {"val/loss"}  # the last segment, as without convergence


def test_swad_decides_on_the_raw_weights_whatever_else_is_measured(tmp_path: Path) -> None:
    found = []
    for validate, others in (("raw", []), ("both", []), ("both", [EMA(decay=0.5), LAWA(k=2)])):
        swad = SWAD("val/loss", n_converge=2, n_tolerance=2, validate=validate)
        files = ModelCheckpoint(tmp_path, monitor="val/loss", save_top_k=-1)
        run = trainer(tmp_path, [*others, swad, files], max_epochs=6)
        run.fit(Net(norm=True), batches(4), validation())
        found.append((swad.raw_weights(), swad.merged_weights(), run.callback_metrics["val/loss"].item()))
        assert {read(path)["lightning_merge"]["holds"] for path in files.best_k_models} == {"raw"}
    for raw, merged, score in found[1:]:
        assert not differing(raw, found[0][0])
        assert not differing(merged, found[0][1])
        assert score == found[0][2]


def test_a_metric_of_an_average_is_refused_as_the_monitor(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SWAD 'swad' decides on how the raw weights do.* the average 'ema'"):
        trainer(tmp_path, [SWAD("ema/val/loss"), EMA()]).fit(Net(), batches(), validation())


def test_a_metric_that_validation_never_logs_is_named_with_those_it_does(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`monitor` must be .* got 'val/los'; it logs: .*val/loss"):
        trainer(tmp_path, [SWAD("val/los")], max_epochs=1).fit(Net(), batches(), validation())


def test_measuring_the_end_is_no_evaluation_that_swad_decides_by(tmp_path: Path) -> None:
    swad = SWAD("val/loss", validate="both")
    run = trainer(tmp_path, [swad], max_epochs=3, check_val_every_n_epoch=2, precision="64-true")
    module = Scripted([2.0])
    run.fit(module, steps(2), steps(1))  # the last two of six steps come after the only validation
    assert swad.evaluations == 1
    assert module.w.item() == 1.5  # the last segment that was evaluated: 0 ... 3
    assert run.callback_metrics.keys() == {"val/loss", "swad/val/loss"}
