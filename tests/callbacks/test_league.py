"""Averages side by side in one run: who wins, what the file holds, what it costs, and what is refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_merge import callbacks
from lightning_merge.callbacks import EMA, LAWA, SWA, SWAD, AcceptIfBetter, League
from lightning_merge.callbacks._league_run._standing import Standing, table
from lightning_merge.cli import main
from lightning_merge.recipes._catalog import recipes, whole
from lightning_merge.recipes._help import recipe_help
from lightning_merge.recipes._league import with_league

RECIPES = recipes()


class Target(tiny.Walk):  # type: ignore[misc]
    """``w`` walks 1, 2, ... and the loss is its distance from ``target``."""

    def __init__(self, target: float = 0.0) -> None:
        super().__init__()
        self.target = target

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self._distance())
        self.log("val/acc", 1 / (1 + self._distance()))
        self.log("val/score", self._distance())

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/loss", self._distance() + 100)

    def _distance(self) -> Tensor:
        return (self.w.detach() - self.target).abs().sum()


def contestants(**settings: Any) -> list[Any]:
    settings = {"validate": "raw"} | settings
    return [EMA(decay=0.9, **settings), SWA(start_epoch=0, **settings), LAWA(k=2, **settings)]


def fit(league: League, root: Path, target: float = 0.0, *more: Any, **settings: Any) -> tuple[Any, Any]:
    """Raw ends at 8; the mean of the epoch ends 2, 4, 6, 8 is 5, of the last two 7."""
    module = Target(target)
    trainer = tiny.trainer(root, [league, *more], **{"max_epochs": 4} | settings)
    trainer.fit(module, tiny.steps(2), tiny.steps(1))
    return module, trainer


@pytest.mark.parametrize(("target", "winner", "value"), [(5.0, "swa", 5.0), (7.1, "lawa", 7.0), (8.0, "raw", 8.0)])
@pytest.mark.parametrize(
    ("monitor", "mode", "validate"),
    [("val/loss", None, "raw"), ("val/acc", None, "both"), ("val/score", "min", "merged")],
)
def test_the_best_set_wins_and_its_file_holds_what_was_measured(
    monitor: str, mode: Any, target: float, winner: str, value: float, validate: str, tmp_path: Path
) -> None:
    league = League(contestants(validate=validate), monitor, mode)
    module, _ = fit(league, tmp_path, target, ModelCheckpoint(tmp_path))
    assert league.winner == winner
    assert list(league.standings) == ["raw", "ema", "swa", "lawa"]
    distance = abs(value - target)
    expected = 1 / (1 + distance) if monitor == "val/acc" else distance
    assert league.standings[winner].score == pytest.approx(expected, abs=1e-6)
    assert league.path == str(tmp_path / "league-winner.ckpt")
    file = tiny.read(league.path)
    assert file["state_dict"]["w"].item() == value
    label = file["lightning_merge"]
    assert (label["holds"], label["measured"]) == (winner, True)
    assert label["metrics"][monitor] == league.standings[winner].score
    assert module.w.item() == pytest.approx(league.contestants[0].merged_weights()["w"].item())


def test_the_raw_weights_win_a_tie_and_a_nan_never_does(tmp_path: Path) -> None:
    league = League([LAWA(k=1, validate="raw"), EMA(decay=0.0, validate="raw")], "val/loss")
    fit(league, tmp_path)
    assert len({each.score for each in league.standings.values()}) == 1
    assert league.winner == "raw"

    league = League(contestants(), "val/loss")
    fit(league, tmp_path, math.nan)
    assert (league.winner, league.path) == (None, None)


def test_the_table_tells_a_nan_from_what_was_not_measured() -> None:
    of = {name: Standing(math.nan, None, 0.0, 0.0) for name in ("raw", "late")}
    _, raw, late, _ = table("val/loss", of, None, {"late"}).splitlines()
    assert (raw.split()[:2], late.split()[:3]) == (["raw", "nan"], ["late", "not", "measured"])


def test_what_was_not_measured_or_merged_nothing_cannot_win(tmp_path: Path) -> None:
    late = SWA(start_epoch=100, name="late", validate="raw")
    unmeasured = SWA(start_epoch=0, name="unmeasured", validate="raw", final_validation=False)
    league = League([EMA(decay=0.5, validate="raw"), late, unmeasured], "val/loss")
    fit(league, tmp_path, 5.0)
    assert math.isnan(league.standings["late"].score)
    assert math.isnan(league.standings["unmeasured"].score)
    assert league.winner == "ema"


def test_averages_among_the_callbacks_take_part(tmp_path: Path) -> None:
    league = League([EMA(decay=0.5, validate="raw")], "val/loss")
    fit(league, tmp_path, 5.0, SWA(start_epoch=0, validate="raw"))
    assert league.winner == "swa"


def test_a_run_is_the_same_as_without_a_league(tmp_path: Path) -> None:
    def run(root: Path, callbacks: Any) -> Any:
        module = tiny.Net(norm=True)
        tiny.trainer(root, callbacks, max_epochs=4).fit(module, tiny.batches(), tiny.validation())

    def four() -> list[Any]:
        return [*contestants(), EMA(decay=0.9, name="slow", validate="raw")]

    plain, league = four(), League(four(), "val/loss")  # sixteen steps, of which eleven are timed
    run(tmp_path, plain)
    run(tmp_path, [league])
    for before, after in zip(plain, league.contestants, strict=True):
        assert tiny.differing(before.raw_weights(), after.raw_weights()) == []
        assert tiny.differing(before.merged_weights(), after.merged_weights()) == []
        assert before.final_metrics == after.final_metrics


def test_a_resumed_league_ends_as_an_uninterrupted_one(tmp_path: Path) -> None:
    whole = League(contestants(), "val/loss")
    fit(whole, tmp_path / "whole", 5.0)
    saved = ModelCheckpoint(tmp_path, filename="part")
    fit(League(contestants(), "val/loss"), tmp_path, 5.0, saved, max_epochs=2)
    resumed = League(contestants(), "val/loss")
    trainer = tiny.trainer(tmp_path / "resumed", [resumed], max_epochs=4)
    trainer.fit(Target(5.0), tiny.steps(2), tiny.steps(1), ckpt_path=tmp_path / "part.ckpt")
    assert resumed.winner == whole.winner == "swa"
    for name, each in whole.standings.items():
        assert (resumed.standings[name].score, resumed.standings[name].megabytes) == (each.score, each.megabytes)


def test_the_winner_is_what_a_test_measures(tmp_path: Path) -> None:
    league = League(contestants(), "val/loss")
    module, trainer = fit(league, tmp_path, 5.0)
    trainer.test(module, tiny.steps(1), verbose=False)
    assert league.test_metrics == {}  # of the model's own weights
    trainer.test(module, tiny.steps(1), ckpt_path=league.path, verbose=False)
    assert league.test_metrics == {"test/loss": 100.0}
    assert module.w.item() == 5.0


def test_the_table_has_errors_of_accuracies_and_costs(tmp_path: Path) -> None:
    slow = EMA(decay=0.5, every_n_steps=2, name="slow", validate="raw")
    league = League([*contestants(), slow], "val/acc")
    trainer = tiny.trainer(tmp_path, [league], max_epochs=4)
    trainer.fit(Target(4.0), tiny.steps(2), tiny.steps(25))
    raw, swa, lawa = (league.standings[name] for name in ("raw", "swa", "lawa"))
    assert (raw.score, raw.ms_per_step, raw.megabytes) == (pytest.approx(0.2), 0.0, 0.0)
    assert raw.standard_error == pytest.approx(0.08)  # sqrt(0.2 * 0.8 / 25)
    assert swa.standard_error == pytest.approx(0.1)
    assert league.standings["ema"].megabytes == 4e-6
    assert lawa.megabytes > 8e-6 - 1e-12
    assert all(league.standings[name].ms_per_step > 0 for name in ("ema", "swa", "lawa", "slow"))

    league = League(contestants(), "val/loss")
    fit(league, tmp_path)
    assert all(each.standard_error is None for each in league.standings.values())


def test_updates_are_timed_by_their_share_of_the_steps(tmp_path: Path) -> None:
    league = League([EMA(decay=0.5, every_n_steps=4, validate="raw")], "val/loss")
    fit(league, tmp_path)
    league._stopwatches["ema"].times = [1.0, 3.0, 2.0]
    assert league.contestants[0].updates == 2
    assert league._stopwatches["ema"].ms_per_step == 500.0  # two updates of 2 s in eight steps


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (lambda: League([], "val/loss"), ValueError, r"`contestants` must be averages, at least one, .*got none"),
        (lambda: League(EMA(), "val/loss"), TypeError, "`contestants` must be a list of averages"),  # type: ignore[arg-type]
        (lambda: League([EMA(), ModelCheckpoint()], "val/loss"), TypeError, "`contestants` must be a list of averages"),  # type: ignore[list-item]
        (lambda: League([EMA(), EMA(0.9)], "val/loss"), ValueError, r"several are called 'ema': name='other'"),
        (lambda: League([SWAD("val/loss")], "val/loss"), ValueError, r"SWAD 'swad' would end the run.*`stop=False`"),
        (lambda: League([SWA(swa_lr=0.1)], "val/loss"), ValueError, r"SWA 'swa' would set the learning rate.*swa_lr"),
        (lambda: League([EMA()], "val/loss", "best"), ValueError, "`mode`"),  # type: ignore[arg-type]
        (lambda: League([EMA()], ""), ValueError, "`monitor`"),
    ],
)
def test_what_cannot_be_compared_is_refused_at_construction(make: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        make()


@pytest.mark.parametrize(
    ("monitor", "more", "says"),
    [
        (
            "val/los",
            [],
            r"`monitor` of League must be .* got 'val/los'; it logs:.*val/loss",
        ),
        ("val/score", [], r"`mode` of League must be given for 'val/score'"),
        ("val/loss", [AcceptIfBetter("val/loss")], "League and AcceptIfBetter both choose"),
        ("val/loss", [SWA(swa_lr=0.1)], "would set the learning rate"),
        ("val/loss", [EMA()], "`name` must be unique in a Trainer, but 2 averages are called 'ema'"),
    ],
)
def test_what_does_not_fit_the_run_is_refused(monitor: str, more: list[Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=says):
        fit(League([EMA()], monitor), tmp_path, 0.0, *more)


def test_a_run_without_validation_is_refused(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, [League([EMA()], "val/loss")], max_epochs=1)
    with pytest.raises(ValueError, match="League measures by validation: give the Trainer a validation loader"):
        trainer.fit(Target(), tiny.steps(2))


def test_a_recipe_runs_as_a_league(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    few = ["--trainer.max_epochs=2", "--trainer.limit_train_batches=4", f"--trainer.default_root_dir={tmp_path}"]
    with caplog.at_level("INFO"):
        assert main(["run", "digits/swa", "--league", *few]) == 0
    (path,) = tmp_path.rglob("league-winner.ckpt")
    (table,) = [message for message in caplog.messages if message.startswith("weights ")]
    names = ["raw", "ema-0.02", "ema-0.05", "ema-0.1", "swa", "lawa", "swad", "posthoc-ema"]
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == names
    assert any("on test data: test/loss" in message for message in caplog.messages)
    assert set(tiny.read(path)["lightning_merge"]["averages"]) == set(names[1:])
    assert main(["verify", str(path.parents[1])]) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_that_watches_a_metric_makes_a_league_that_a_run_takes(name: str) -> None:
    text = whole(name)
    watches = "monitor: val/acc" in text
    assert (f"lightning-merge run {name} --league" in recipe_help(name)) == watches
    if not watches:
        with pytest.raises(ValueError, match="needs a recipe that watches a validation metric"):
            with_league(name, text)
        return
    *others, given = yaml.safe_load(with_league(name, text))["trainer"]["callbacks"]
    made = [getattr(callbacks, each["class_path"].rpartition(".")[2]) for each in given["init_args"]["contestants"]]
    settings = [each["init_args"] for each in given["init_args"]["contestants"]]
    league = League([kind(**each) for kind, each in zip(made, settings, strict=True)], "val/acc", "max")
    assert len(league.contestants) == 7
    assert not [
        each
        for each in others
        if each["class_path"].startswith("lightning_merge.callbacks.")
        and not each["class_path"].endswith("RandomState")
    ]


def test_a_stream_of_tasks_is_no_league(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "continual/digits", "--league"]) == 2
    assert "`--league` needs a recipe that watches a validation metric" in capfd.readouterr().err
