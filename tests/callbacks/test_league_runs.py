"""A league in runs that go otherwise than planned: searched, resumed, stopped, continued, refused, or failing late."""

import math
import re
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.tuner.tuning import Tuner
from test_league import Target, contestants, fit
from torch import Tensor

from lightning_merge.callbacks import EMA, LAWA, SWA, TWA, AcceptIfBetter, Doctor, League, Lookaround, PostHocEMA
from lightning_merge.callbacks._league_run import _standing
from lightning_merge.cli import main


def placed(league: League, root: Path, **settings: Any) -> Any:
    return tiny.trainer(root, [league, ModelCheckpoint(root, filename="part")], **{"max_epochs": 4} | settings)


def scores(league: League) -> dict[str, float]:
    return {name: each.score for name, each in league.standings.items()}


@pytest.fixture
def usual(tmp_path: Path) -> League:
    """A league after a run of which nothing is to be said."""
    league = League(contestants(), "val/loss")
    fit(league, tmp_path / "usual", 5.0, ModelCheckpoint(tmp_path / "usual"))
    return league


# ---- before, between and after fits


def search(trainer: Any, module: Any) -> None:
    Tuner(trainer).lr_find(
        module, tiny.steps(2), tiny.steps(1), num_training=2, early_stop_threshold=None, update_attr=False
    )


BEFORE: dict[str, Callable[[Any, Any], Any]] = {
    "validate": lambda trainer, module: trainer.validate(module, tiny.steps(1), verbose=False),
    "validate on other loaders": lambda trainer, module: trainer.validate(module, [tiny.steps(1)] * 2, verbose=False),
    "test": lambda trainer, module: trainer.test(module, tiny.steps(1), verbose=False),
    "a search for the rate": search,
}


class Described(Target):
    """With a rate that a search may look for, and validation on any number of loaders."""

    def validation_step(self, batch: Tensor, batch_idx: int, dataloader_idx: int = 0) -> None:
        super().validation_step(batch, batch_idx)


@pytest.mark.parametrize("before", BEFORE)
def test_what_a_trainer_does_before_the_fit_changes_nothing(before: str, usual: League, tmp_path: Path) -> None:
    league, module = League(contestants(), "val/loss"), Described(5.0)
    trainer = placed(league, tmp_path)
    BEFORE[before](trainer, module)
    assert (league.winner, league.standings, league.test_metrics) == (None, {}, {})
    trainer.fit(module, tiny.steps(2), tiny.steps(1))
    assert scores(league) == scores(usual)
    assert league.winner == usual.winner


@pytest.mark.parametrize("same", [True, False], ids=["the same Trainer", "another Trainer"])
def test_a_second_fit_goes_on_and_ranks_anew(same: bool, usual: League, tmp_path: Path) -> None:
    league, module = League(contestants(), "val/loss"), Target(5.0)
    trainer = placed(league, tmp_path, max_epochs=2)
    trainer.fit(module, tiny.steps(2), tiny.steps(1))
    first = league.winner
    if same:
        trainer.fit_loop.max_epochs = 4
    else:
        trainer = placed(league, tmp_path / "2", max_epochs=2)
    trainer.fit(module, tiny.steps(2), tiny.steps(1))
    assert first == "raw"  # 4, after the epochs at 2 and 4
    assert scores(league) == pytest.approx(scores(usual))
    assert sum(callback in league.contestants for callback in trainer.callbacks) == 3


def test_a_fast_run_writes_nothing_and_ranks(tmp_path: Path) -> None:
    league = League(contestants(), "val/loss")
    fit(league, tmp_path, 5.0, fast_dev_run=True)
    assert league.winner is not None
    assert league.path is None
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_fit_in_which_nothing_was_merged_says_that_nothing_was_ranked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    league = League([SWA(start_epoch=9, validate="raw")], "val/loss")
    with caplog.at_level("INFO"):
        fit(league, tmp_path, 5.0)
    assert (league.winner, league.path) == (None, None)
    assert "League: nothing was ranked" in caplog.text


# ---- stopped and resumed


class Stops(Callback):
    """Ends a run in its second epoch."""

    def __init__(self, how: str) -> None:
        self.how = how

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch == 1 and batch_idx == 1:
            if self.how == "SIGTERM":
                signal.raise_signal(signal.SIGTERM)
            else:
                raise {"error": RuntimeError, "Ctrl-C": KeyboardInterrupt}[self.how]("as told")


@pytest.mark.parametrize("how", ["error", "Ctrl-C", "SIGTERM"])
def test_a_run_that_is_stopped_has_no_winner_and_goes_on(how: str, usual: League, tmp_path: Path) -> None:
    league, module = League(contestants(), "val/loss"), Target(5.0)
    every = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    trainer = tiny.trainer(tmp_path, [league, every, Stops(how)], max_epochs=4)
    with pytest.raises(BaseException, match=r"as told|SIGTERM|^$|1|0"):
        trainer.fit(module, tiny.steps(2), tiny.steps(1))
    assert (league.winner, league.path, league.standings) == (None, None, {})
    assert not any("take_in" in each.__dict__ for each in league.contestants)
    assert module.w.item() in (3.0, 4.0)  # raw: SIGTERM lets the step end

    resumed = League(contestants(), "val/loss")
    place = tmp_path / f"step={int(module.w.item())}.ckpt"
    trainer = placed(resumed, tmp_path / "resumed")
    trainer.fit(Target(5.0), tiny.steps(2), tiny.steps(1), ckpt_path=place)
    assert scores(resumed) == scores(usual)


MEMBERS: dict[str, tuple[Callable[[], list[Any]], str]] = {
    "one more": (lambda: [*contestants(), EMA(0.5, name="new", validate="raw")], "EMA 'new' starts empty"),
    "one less": (lambda: contestants()[:2], "averages that this Trainer has not, and drops: lawa"),
    "another order": (lambda: contestants()[::-1], ""),
    "another setting": (
        lambda: [EMA(0.5, validate="raw"), *contestants()[1:]],
        r"EMA 'ema' goes on from a file that was written with ExponentialMean\(decay=0.9",
    ),
}


def test_a_resume_with_another_class_under_a_name_is_refused_and_says_how_to_go_on(tmp_path: Path) -> None:
    placed(League(contestants(), "val/loss"), tmp_path, max_epochs=2).fit(Target(5.0), tiny.steps(2), tiny.steps(1))
    league = League([LAWA(k=2, name="ema", validate="raw"), *contestants()[1:2]], "val/loss")
    says = r"LAWA 'ema' cannot go on from .* written with ExponentialMean\(.*give this one another `name`"
    with pytest.raises(ValueError, match=says):
        placed(league, tmp_path / "2").fit(Target(5.0), tiny.steps(2), tiny.steps(1), ckpt_path=tmp_path / "part.ckpt")


@pytest.mark.parametrize("change", MEMBERS)
def test_a_resume_with_other_members_says_so_and_ranks_what_there_is(
    change: str, usual: League, tmp_path: Path
) -> None:
    part = tmp_path / "part.ckpt"
    placed(League(contestants(), "val/loss"), tmp_path, max_epochs=2).fit(Target(5.0), tiny.steps(2), tiny.steps(1))
    make, says = MEMBERS[change]
    league = League(make(), "val/loss")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        placed(league, tmp_path / "2").fit(Target(5.0), tiny.steps(2), tiny.steps(1), ckpt_path=part)
    assert any(re.search(says, str(each.message)) for each in said)
    kept = {name: score for name, score in scores(usual).items() if name in league.standings and name != "ema"}
    assert kept.items() <= scores(league).items()
    assert set(league.standings) == {"raw", *(each.name for each in league.contestants)}
    assert tiny.read(str(league.path))["lightning_merge"]["holds"] == league.winner


def test_a_finished_run_that_is_resumed_ranks_nothing_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    placed(League(contestants(), "val/loss"), tmp_path).fit(Target(5.0), tiny.steps(2), tiny.steps(1))
    league = League(contestants(), "val/loss")
    with caplog.at_level("INFO"):
        placed(league, tmp_path / "2").fit(Target(5.0), tiny.steps(2), tiny.steps(1), ckpt_path=tmp_path / "part.ckpt")
    assert (league.winner, league.standings) == (None, {})
    assert "League: nothing was ranked" in caplog.text


# ---- what fails late loses nothing


class Silent(Target):
    """Logs its score under another name."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/points", self._distance())


JUDGES: dict[str, Callable[[str], Any]] = {
    "League": lambda monitor: League([PostHocEMA(name="other", validate="raw")], monitor),
    "AcceptIfBetter": lambda monitor: AcceptIfBetter(monitor, shares=(0.5,)),
    "Doctor": lambda monitor: Doctor(monitor, points=1),
}


@pytest.mark.parametrize("monitor", ["val/loss", "val/points"])
@pytest.mark.parametrize("judge", JUDGES)
def test_a_metric_that_turns_out_to_be_missing_at_the_end_does_not_lose_the_fit(
    judge: str, monitor: str, tmp_path: Path
) -> None:
    """The first validation is that of the final weights; ``val/points`` is logged and needs a mode."""
    average = SWA(start_epoch=0)
    judges = [JUDGES[judge](monitor), average]
    module, saved = Silent(5.0), ModelCheckpoint(tmp_path)
    trainer = tiny.trainer(tmp_path, [*judges, saved], max_epochs=4, check_val_every_n_epoch=9)
    trainer.fit(module, tiny.steps(2), tiny.steps(1))
    assert Path(average.final_path).is_file()  # type: ignore[arg-type]
    first = next(callback for callback in trainer.callbacks if hasattr(callback, "merged_weights"))
    assert tiny.differing(module, first.merged_weights()) == []


class FailsAtTheEnd(Target):
    """Its validation fails, and is run at the end only."""

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        raise RuntimeError("no room")


@pytest.mark.parametrize("what", ["measuring", "writing"])
def test_a_winner_that_cannot_be_found_or_written_does_not_lose_the_fit(what: str, tmp_path: Path) -> None:
    league, kind = League(contestants(), "val/loss"), FailsAtTheEnd if what == "measuring" else Target
    module, saved = kind(5.0), ModelCheckpoint(tmp_path)
    (tmp_path / "league-winner.ckpt").mkdir()
    (tmp_path / "league-winner.ckpt" / "full").touch()
    trainer = tiny.trainer(tmp_path, [league, saved], max_epochs=4, check_val_every_n_epoch=9)
    with pytest.warns(UserWarning, match="no room" if what == "measuring" else r"winner.ckpt could not be written"):
        trainer.fit(module, tiny.steps(2), tiny.steps(1))
    assert league.path is None
    assert league.winner == (None if what == "measuring" else "swa")
    assert all(Path(str(each.final_path)).is_file() for each in league.contestants)
    assert tiny.differing(module, league.contestants[0].merged_weights()) == []


def test_a_file_takes_the_place_of_a_sharded_checkpoint_of_that_name(tmp_path: Path) -> None:
    for name in ("league-winner.ckpt", "ema-final.ckpt"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.pt").touch()
        (tmp_path / name / ".metadata").touch()
    league = League(contestants(), "val/loss")
    fit(league, tmp_path, 5.0, ModelCheckpoint(tmp_path))
    assert tiny.read(str(league.path))["state_dict"]["w"].item() == 5.0
    assert Path(str(league.contestants[0].final_path)).is_file()


# ---- refused


@pytest.mark.parametrize("judge", JUDGES)
@pytest.mark.parametrize("prefix", ["raw", "swa"])
def test_a_metric_of_one_set_is_refused_by_whoever_compares_sets(judge: str, prefix: str, tmp_path: Path) -> None:
    judges = [JUDGES[judge](f"{prefix}/val/loss"), SWA(start_epoch=0, validate="both")]
    with pytest.raises(ValueError, match=rf"under its plain name, got '{prefix}/val/loss'.*leave `{prefix}/` out"):
        tiny.trainer(tmp_path, judges, max_epochs=1).fit(Target(), tiny.steps(2), tiny.steps(1))


@pytest.mark.parametrize("make", [lambda: Lookaround(2, 2), lambda: TWA()])
def test_what_trains_otherwise_is_no_contestant(make: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="changes how the model trains, and all contestants"):
        League([EMA(), make()], "val/loss")
    with pytest.raises(ValueError, match="changes how the model trains, and all contestants"):
        fit(League([EMA()], "val/loss"), tmp_path, 0.0, make())


def test_an_average_that_is_called_as_a_metric_begins_is_refused_or_keeps_the_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave `val/` out, or give the average another name"):
        fit(League([EMA(name="val")], "val/loss"), tmp_path)
    first, second = EMA(0.5, name="val"), EMA(0.9, name="other")
    trainer = tiny.trainer(tmp_path, [first, second], max_epochs=1)
    trainer.fit(Target(), tiny.steps(2), tiny.steps(1))
    assert first.final_metrics.keys() == second.final_metrics.keys() == {"val/loss", "val/acc", "val/score"}


def test_two_leagues_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several Leagues among the callbacks"):
        fit(League([EMA()], "val/loss"), tmp_path, 0.0, League([SWA()], "val/loss"))


def test_without_batches_of_validation_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="League measures by validation"):
        fit(League([EMA()], "val/loss"), tmp_path, 0.0, limit_val_batches=0)


# ---- the standard error is of the samples that were measured


def loader(n: int, kind: str) -> Any:
    from torch.utils.data import DataLoader, SubsetRandomSampler

    data: Any = list(torch.zeros(n, 1))
    loaders: dict[str, Callable[[], Any]] = {
        "a loader": lambda: DataLoader(data, batch_size=3),
        "a list of one": lambda: [DataLoader(data, batch_size=3)],
        "a part of the data": lambda: DataLoader(data + data, batch_size=3, sampler=SubsetRandomSampler(range(n))),
        "two loaders": lambda: [DataLoader(data, batch_size=3), DataLoader(data, batch_size=3)],
        "several processes": lambda: DataLoader(data, batch_size=3),
    }
    return loaders[kind]()


@pytest.mark.parametrize(
    ("kind", "n"),
    [
        ("a loader", 12),
        ("a list of one", 12),
        ("a part of the data", 12),
        ("two loaders", None),
        ("several processes", None),
    ],
)
def test_the_standard_error_is_of_as_many_samples_as_are_known(
    kind: str, n: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_standing, "several", lambda: kind == "several processes")  # of which each may log its own
    monitor = "val/acc/dataloader_idx_0" if kind == "two loaders" else "val/acc"
    league, module = League(contestants(), monitor), Described(4.0)
    tiny.trainer(tmp_path, [league], max_epochs=4).fit(module, tiny.steps(2), loader(12, kind))
    raw = league.standings["raw"]
    assert raw.standard_error == (None if n is None else pytest.approx(math.sqrt(raw.score * (1 - raw.score) / n)))


# ---- commands read the winner's file


def test_commands_know_the_winners_file(usual: League, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(usual.path)]) == 0
    assert "swa" in capsys.readouterr().out
    assert main(["export", str(usual.path), str(tmp_path / "plain.pt")]) == 0
    plain = Target()
    plain.load_state_dict(torch.load(tmp_path / "plain.pt", weights_only=True), strict=True)
    assert plain.w.item() == 5.0
    with pytest.raises(ValueError, match=r"weights.only"):
        placed(League(contestants(), "val/loss"), tmp_path).fit(
            Target(), tiny.steps(2), tiny.steps(1), ckpt_path=usual.path
        )
