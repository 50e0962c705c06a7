"""What is published at the end: raw, merged or between, by a score; and what a doctor says of a run."""

import math
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor

from lightning_merge.calibration import recalibrated_statistics
from lightning_merge.callbacks import ASWA, EMA, SMA, SWA, SWAD, AcceptIfBetter, Doctor
from lightning_merge.cli import main
from lightning_merge.diagnostics import between


class Target(tiny.Walk):  # type: ignore[misc]
    """``w`` walks 1, 2, ... and the loss is its distance from ``target``; the mean of the run lies behind it."""

    def __init__(self, target: float) -> None:
        super().__init__()
        self.target = target

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", (self.w.detach() - self.target).abs().sum())
        self.log("val/score", -(self.w.detach() - self.target).abs().sum())


def fit(target: float, root: Path, *callbacks: Any, **settings: Any) -> tuple[Any, Any]:
    """Raw ends at 8, the mean of the last four epoch ends (2, 4, 6, 8) at 5."""
    module = Target(target)
    trainer = tiny.trainer(root, callbacks, max_epochs=4, **settings)
    trainer.fit(module, tiny.steps(2), tiny.steps(1))
    return module, trainer


@pytest.mark.parametrize(
    ("target", "share", "value"),
    [(8.0, 0.0, 8.0), (5.0, 1.0, 5.0), (3.0, 1.0, 5.0), (6.6, 0.5, 6.5), (7.2, 0.25, 7.25)],
)
@pytest.mark.parametrize(("monitor", "mode"), [("val/loss", "min"), ("val/score", "max")])
def test_the_point_that_scores_best_is_published(
    target: float, share: float, value: float, monitor: str, mode: Any, tmp_path: Path
) -> None:
    swa = SWA(start_epoch=0)
    judge = AcceptIfBetter(monitor, mode)
    saved = ModelCheckpoint(tmp_path, monitor="val/loss", save_last=True)
    module, trainer = fit(target, tmp_path, swa, judge, saved)
    assert module.w.item() == value
    assert swa.accepted == (None if share == 1 else share)
    assert swa.final_metrics["val/loss"] == pytest.approx(abs(value - target), abs=1e-6)
    assert trainer.callback_metrics["val/loss"] == pytest.approx(abs(value - target), abs=1e-6)
    file = tiny.read(tmp_path / "swa-final.ckpt")
    assert file["state_dict"]["w"].item() == value
    assert file["lightning_merge"]["metrics"]["val/loss"] == pytest.approx(abs(value - target), abs=1e-6)
    assert swa.merged_weights()["w"].item() == 5.0  # type: ignore[index]  # to go on with
    assert swa.raw_weights()["w"].item() == 8.0
    assert set(judge.scores["swa"]) == {0.0, 0.25, 0.5, 0.75, 1.0}
    assert not any("probe" in key for key in trainer.callback_metrics)


def test_measuring_leaves_nothing_in_logs_and_training_as_it_was(tmp_path: Path) -> None:
    def run(*more: Any) -> Any:
        torch.manual_seed(0)
        root = tmp_path / str(len(more))
        ema = EMA(decay=0.9)
        trainer = tiny.trainer(root, [ema, *more], max_epochs=2, logger=CSVLogger(root, "", ""), log_every_n_steps=1)
        module = tiny.Net(norm=True)
        trainer.fit(module, tiny.batches(), tiny.validation())
        return ema, (root / "metrics.csv").read_text(), torch.get_rng_state()

    plain, with_judge = run(), run(AcceptIfBetter("val/loss"), Doctor())
    assert "probe" not in with_judge[1]
    assert with_judge[1].splitlines()[:-1] == plain[1].splitlines()[: len(with_judge[1].splitlines()) - 1]
    assert tiny.differing(plain[0].raw_weights(), with_judge[0].raw_weights()) == []
    assert tiny.differing(plain[0].merged_weights(), with_judge[0].merged_weights()) == []
    assert torch.equal(plain[2], with_judge[2])


def test_no_callback_sees_what_is_only_looked_at(tmp_path: Path) -> None:
    class Counts(pl.Callback):
        seen = 0

        def on_validation_end(self, *args: Any) -> None:
            self.seen += 1

    plain, judged = Counts(), Counts()
    fit(5.0, tmp_path, SWA(start_epoch=0), plain)
    fit(5.0, tmp_path, SWA(start_epoch=0), judged, AcceptIfBetter("val/loss", shares=(0.5,)), Doctor())
    assert judged.seen == plain.seen


def test_statistics_of_a_point_between_are_measured_where_the_average_measures_its_own(tmp_path: Path) -> None:
    swa = SWA(start_epoch=0)
    judge = AcceptIfBetter("val/loss", shares=(0.5,))
    module = tiny.Net(norm=True)
    trainer = tiny.trainer(tmp_path, [swa, judge], max_epochs=3)
    trainer.fit(module, tiny.batches(), tiny.validation())
    for share in (0.5, 1.0):
        raw, merged = swa.raw_weights(), swa.merged_weights()
        point = between(raw, merged, share)  # type: ignore[arg-type]
        fitted = tiny.Net(norm=True)
        fitted.load_state_dict({**tiny.values(module), **point})
        statistics = recalibrated_statistics(
            fitted, [*tiny.batches()] * 3, lambda batch, module=fitted: module(batch[0])
        )
        expected = tiny.score({**tiny.values(fitted), **statistics}, norm=True)
        assert judge.scores["swa"][share] == pytest.approx(expected, rel=1e-5)  # three epochs


def test_the_published_point_has_the_statistics_it_was_measured_with(tmp_path: Path) -> None:
    swa, judge = SWA(start_epoch=0), AcceptIfBetter("val/loss")
    judge.shares = (0.5,)  # so that it is chosen
    trainer = tiny.trainer(tmp_path, [swa, judge, ModelCheckpoint(tmp_path)], max_epochs=3)
    trainer.fit(tiny.Net(norm=True), tiny.batches(), tiny.validation())
    assert swa.accepted == 0.5
    expected = judge.scores["swa"][0.5]
    assert tiny.score(tiny.read(tmp_path / "swa-final.ckpt")["state_dict"], norm=True) == pytest.approx(expected)
    assert swa.final_metrics["val/loss"] == pytest.approx(expected)


def test_a_resumed_finished_run_publishes_what_was_accepted_and_a_longer_one_decides_anew(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, monitor="val/loss")
    fit(8.0, tmp_path, SWA(start_epoch=0), AcceptIfBetter("val/loss"), saved)
    path = tmp_path / "swa-final.ckpt"
    swa = SWA(start_epoch=0)
    module = Target(8.0)
    tiny.trainer(tmp_path, [swa], max_epochs=4).fit(module, tiny.steps(2), tiny.steps(1), ckpt_path=path)
    assert module.w.item() == 8.0
    swa = SWA(start_epoch=0)
    tiny.trainer(tmp_path, [swa], max_epochs=5).fit(module, tiny.steps(2), tiny.steps(1), ckpt_path=path)
    assert (swa.accepted, module.w.item()) == (None, 6.0)


def test_a_second_fit_goes_on_from_raw_weights_and_the_average(tmp_path: Path) -> None:
    swa, judge = SWA(start_epoch=0), AcceptIfBetter("val/loss")
    module, trainer = fit(6.6, tmp_path, swa, judge)
    assert module.w.item() == 6.5
    trainer.fit_loop.max_epochs = 5
    trainer.fit(module, tiny.steps(2), tiny.steps(1))
    assert swa.raw_weights()["w"].item() == 10.0
    assert swa.merged_weights()["w"].item() == 6.0  # type: ignore[index]


def test_inspect_and_verify_know_what_was_accepted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(6.6, tmp_path, SWA(start_epoch=0), AcceptIfBetter("val/loss"), ModelCheckpoint(tmp_path))
    assert main(["inspect", str(tmp_path / "swa-final.ckpt")]) == 0
    assert "of which 50% of the way from raw was accepted" in capsys.readouterr().out


class Diverging(Target):
    """Its weights become NaN in the last epoch; what it logs of them is a NaN, or hides it."""

    def __init__(self, blind: bool) -> None:
        super().__init__(5.0)
        self.blind = blind

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("nan") if self.current_epoch == 3 else loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        loss = (self.w.detach() - self.target).abs().sum()
        self.log("val/loss", loss.nan_to_num() if self.blind else loss)


@pytest.mark.filterwarnings("ignore:.*holds a NaN or an infinity")
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize("shares", [(0.0, 0.25, 0.5, 0.75), (0.5, 0.0), (0.0,)])
@pytest.mark.parametrize("blind", [False, True], ids=["NaN metric", "metric that hides a NaN"])
def test_weights_with_a_nan_are_never_published(blind: bool, shares: Any, mode: Any, tmp_path: Path) -> None:
    module, judge = Diverging(blind), AcceptIfBetter("val/loss", mode, shares)
    trainer = tiny.trainer(tmp_path, [EMA(decay=0.5), judge], max_epochs=4)
    trainer.fit(module, tiny.steps(2), tiny.steps(1))
    assert module.w.isfinite()
    assert [share for share, score in judge.scores["ema"].items() if math.isnan(score)] == sorted(shares)


def test_where_no_share_can_be_chosen_the_merged_weights_are_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        module, _ = fit(float("nan"), tmp_path, SWA(start_epoch=0), AcceptIfBetter("val/loss"))
    assert module.w.item() == 5.0
    assert "publishes the merged weights, since no score can be chosen." in caplog.text


def test_of_equal_scores_the_largest_share_wins_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        module, _ = fit(6.5, tmp_path, SWA(start_epoch=0), AcceptIfBetter("val/loss", shares=(0.0,)))
    assert module.w.item() == 5.0  # as far from 6.5 as 8
    assert "publishes the merged weights, the largest of the equal shares 0%, 100%." in caplog.text


def test_a_mode_that_no_name_says_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`mode` of AcceptIfBetter must be given for 'val/score'"):
        fit(8.0, tmp_path, SWA(start_epoch=0), AcceptIfBetter("val/score"))
    for average in (ASWA, SMA):
        with pytest.raises(ValueError, match=rf"`mode` of {average.__name__} must be given for 'val/score'"):
            average("val/score")
        assert (average("val/loss").mode, average("val/acc").mode) == ("min", "max")
    for lower in (SWAD, Doctor):
        with pytest.raises(ValueError, match=r"`monitor` of .* must be a metric of which lower is better"):
            lower("val/acc")


def test_every_average_is_judged(tmp_path: Path) -> None:
    judge = AcceptIfBetter("val/loss", shares=(0.0,))
    first, second = SWA(start_epoch=0), EMA(decay=0.5)
    fit(8.0, tmp_path, first, second, judge)
    assert judge.scores.keys() == {"swa", "ema"}
    assert (first.accepted, second.accepted) == (0.0, 0.0)


def test_an_average_that_never_started_is_left_alone(tmp_path: Path) -> None:
    judge, doctor = AcceptIfBetter("val/loss"), Doctor()
    module, _ = fit(8.0, tmp_path, EMA(start_step=100), judge, doctor)
    assert (judge.scores, doctor.examinations, module.w.item()) == ({}, {}, 8.0)


def test_beside_swad_the_raw_weights_own_the_plain_names(tmp_path: Path) -> None:
    swad, judge = SWAD(monitor="val/loss", n_converge=1, n_tolerance=1), AcceptIfBetter("val/loss")
    fit(3.0, tmp_path, swad, judge)
    assert set(judge.scores["swad"]) == {0.0, 0.25, 0.5, 0.75, 1.0}


@pytest.mark.parametrize("validate", ["both", "raw", "merged"])
def test_it_works_whatever_validation_measures(validate: Any, tmp_path: Path) -> None:
    module, _ = fit(8.0, tmp_path, SWA(start_epoch=0, validate=validate), AcceptIfBetter("val/loss"), Doctor())
    assert module.w.item() == 8.0


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"mode": "least"}, r"`mode` must be 'min' or 'max', got 'least'"),
        ({"shares": ()}, r"`shares` must be numbers in \[0, 1\], at least one"),
        ({"shares": (0.5, 1.5)}, r"`shares` must be numbers in \[0, 1\]"),
    ],
)
def test_an_argument_out_of_range_is_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        AcceptIfBetter("val/loss", **arguments)


@pytest.mark.parametrize("callback", [AcceptIfBetter("val/los"), Doctor("val/los")], ids=["accept", "doctor"])
def test_what_it_cannot_measure_is_refused_early(callback: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`monitor` of \w+ must be a metric that validation logs, got 'val/los'"):
        fit(8.0, tmp_path, EMA(), callback)
    with pytest.raises(ValueError, match="looks at averages, and there is none"):
        fit(8.0, tmp_path, callback)
    with pytest.raises(ValueError, match="measures by validation"):
        tiny.trainer(tmp_path, [EMA(), callback], max_epochs=1).fit(tiny.Net(), tiny.batches())


# ---- the doctor


def test_doctor_of_a_healthy_run_says_merge_and_changes_nothing(tmp_path: Path) -> None:
    doctor = Doctor(points=1)
    module, _ = fit(5.0, tmp_path, SWA(start_epoch=0), doctor)
    found = doctor.examinations["swa"]
    assert module.w.item() == 5.0
    assert found.verdict == "merge"
    assert found.line == {0.0: 3.0, 0.5: 1.5, 1.0: 0.0}


def test_doctor_finds_an_average_that_is_still_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    doctor = Doctor(points=1)
    with caplog.at_level("INFO"):
        fit(8.0, tmp_path, EMA(decay=0.99), doctor)
    found = doctor.examinations["ema"]
    assert "start" in {finding.problem for finding in found.findings}
    assert found.measures["share of the start in ema"] == pytest.approx(0.99**8)
    assert "92% of ema is still the weights of the start" in caplog.text


def test_doctor_works_in_the_twin_package(package: Any, tmp_path: Path) -> None:
    doctor, judge = Doctor(points=1), AcceptIfBetter("val/loss")
    trainer = tiny.trainer(tmp_path, [EMA(decay=0.5), doctor, judge], package, max_epochs=2)
    trainer.fit(tiny.of(tiny.NetParts, package)(), tiny.batches(), tiny.validation())
    assert doctor.examinations.keys() == judge.scores.keys() == {"ema"}
    assert isinstance(doctor, pl.Callback)
