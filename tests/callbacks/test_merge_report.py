"""``Report``: the page on a fit, whatever the Trainer, its metrics and its end."""

import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from browser import CHROMIUM, Browser
from golden.runs import METHODS, averages, loaders, module
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from processes import launch
from ranks import Wide, ddp, fit
from tiny import Net, Walk, batches, steps, trainer, validation
from torch import Tensor

from lightning_merge._commands._report import _titles
from lightning_merge._report._page import NAME, page, read
from lightning_merge._report._record import Record
from lightning_merge.callbacks import EMA, LAWA, SWA, SWAD, AcceptIfBetter, Report

PHONE = 400


def fitted(root: Path, callbacks: list[Any], network: Any = None, **settings: Any) -> Any:
    fit = trainer(root, callbacks, **{"max_epochs": 3, "log_every_n_steps": 2, **settings})
    fit.fit(Net() if network is None else network, batches(), validation())
    return fit


def written(report: Report) -> Record:
    assert report.path is not None
    (record,) = read(Path(report.path))
    return record


def points(record: Record, metric: str, of: str) -> list[tuple[int, float]]:
    return record.measured[metric][of].drawn()


class Parsed(HTMLParser):
    """Refuses a page whose elements do not close, and collects what it shows and what it would fetch."""

    VOID = ("meta", "br", "path", "circle")
    OPTIONAL = ("tr", "td", "th", "p", "li")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.shown: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [value or "" for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in (*self.VOID, *self.OPTIONAL):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in (*self.VOID, *self.OPTIONAL):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] not in (["script"], ["style"]):
            self.shown.append(data)


# ---- what is on it


def test_raw_and_merged_metrics_are_those_that_were_measured(tmp_path: Path) -> None:
    report = Report()
    fit = trainer(tmp_path, [EMA(0.5, validate="both"), SWA(start_epoch=1), report], max_epochs=3)
    fit.fit(Walk(), steps(2), steps(1))  # w is 2, 4, 6 at the validations
    record = written(report)
    assert points(record, "val/w", "raw") == [(1, 2.0), (3, 4.0), (5, 6.0)]
    assert points(record, "val/w", "ema") == [(1, 1.25), (3, 3.0625), (5, 5.015625)]
    assert points(record, "val/w", "swa") == [(1, 2.0), (3, 3.0), (5, 4.0)]
    assert list(record.about) == ["ema", "swa"]


def test_what_was_not_measured_is_not_on_it(tmp_path: Path) -> None:
    """An average that is not ready yet logs the raw figures under its name; a metric may be left out."""

    class Now(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            if self.current_epoch % 2:
                self.log("val/second", 1.0)

    report = Report()
    fitted(tmp_path, [SWA(start_epoch=2), report], Now(), max_epochs=4)
    record = written(report)
    assert [step for step, _ in points(record, "val/loss", "swa")] == [7, 11, 15]
    assert [step for step, _ in points(record, "val/loss", "raw")] == [3]
    assert [step for step, _ in points(record, "val/second", "swa")] == [7, 15]


def test_what_training_logs_is_on_it(tmp_path: Path) -> None:
    class Logs(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.log("train/epoch", float(self.current_epoch), on_step=False, on_epoch=True)
            self.log("train/both", float(batch_idx), on_step=True, on_epoch=True)
            return super().training_step(batch, batch_idx)

    report = Report()
    fitted(tmp_path, [report], Logs(), accumulate_grad_batches=2)
    record = written(report)
    assert [step for step, _ in record.trained["train/loss"]["raw"].drawn()] == [1, 3, 5]
    assert record.trained["train/epoch"]["raw"].drawn() == [(2, 0.0), (4, 1.0), (6, 2.0)]
    assert record.trained["train/both_step"]["raw"].drawn() == [(1, 3.0), (3, 3.0), (5, 3.0)]
    assert record.trained["train/both_epoch"]["raw"].drawn() == [(2, 1.5), (4, 1.5), (6, 1.5)]
    assert "train/both" not in record.trained
    assert [step for step, _ in points(record, "val/loss", "raw")] == [1, 3, 5]
    assert record.about == {}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gets_a_page(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report, callbacks = Report("val/loss"), METHODS[method]()
    trainer(tmp_path, [report, *callbacks], max_epochs=3, log_every_n_steps=2).fit(module(method), *loaders())
    record = written(report)
    merged = [average.name for average in averages(callbacks)]
    assert list(record.about) == merged
    assert record.measured["val/loss"].keys() <= {"raw", *merged}
    ready = [average for average in averages(callbacks) if average.ready]
    assert all(points(record, "val/loss", average.name) for average in ready if average.validate != "raw")
    for name, age in record.ages.items():
        assert age.mass[-1] + age.start == pytest.approx(1.0, abs=0.002), name
    Parsed(Path(str(report.path)).read_text())


def test_weight_mass_by_age_is_that_of_the_rule(tmp_path: Path) -> None:
    report = Report()
    averages = [EMA(0.5), LAWA(k=2, every_n_steps=2), SWA(start_epoch=0)]
    fitted(tmp_path, [*averages, report], max_epochs=5)
    ages = written(report).ages
    assert ages["ema"].ages[:3] == [0.0, 1.0, 2.0]
    assert ages["ema"].mass[:3] == [0.5, 0.75, 0.875]
    assert ages["ema"].start == pytest.approx(0.5**20)
    assert (ages["lawa"].ages, ages["lawa"].mass, ages["lawa"].mean) == ([0.0, 2.0], [0.5, 1.0], 1.0)
    assert ages["swa"].ages == pytest.approx([0.0, 4.0, 8.0, 12.0, 16.0])
    assert ages["swa"].mass == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_an_average_that_ended_long_ago_is_as_old_as_that(tmp_path: Path) -> None:
    """Of a valley that is over the newest weights are those before its end, however long the run went on."""

    class Rises(Walk):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val/loss", (self.w.detach().sum() - 8).abs())

    report, average = Report(), SWAD("val/loss", n_converge=1, n_tolerance=1, tolerance=0.0, stop=False)
    fit = trainer(tmp_path, [average, report], max_epochs=12, log_every_n_steps=1)
    fit.fit(Rises(), steps(2), steps(1))
    assert average.rule.finished(average._state)
    age = written(report).ages["swad"]
    last = average._state["updates"]
    first, end = average.rule.interval(average._state)
    assert age.mean == pytest.approx(last - (first + end) / 2)
    assert last < 24


# ---- modes, names, values


@pytest.mark.parametrize(("mode", "expected"), [("min", ("lowest", "1")), ("max", ("highest", "3"))])
def test_the_best_is_by_the_mode(mode: Any, expected: tuple[str, str], tmp_path: Path) -> None:
    report = Report("val/w", mode)
    trainer(tmp_path, [EMA(0.5), report], max_epochs=2).fit(Walk(), steps(2), steps(1))
    text = Path(str(report.path)).read_text()
    best, step = expected
    assert re.search(rf"<th>{best}<th>at step<tr><td>ema<td>3\.062<td class=best>[\d.]+<td>{step}</table>", text)


def test_of_a_metric_without_a_mode_both_ends_are_shown(tmp_path: Path) -> None:
    report = Report()
    trainer(tmp_path, [EMA(0.5), report], max_epochs=2).fit(Walk(), steps(2), steps(1))
    text = Path(str(report.path)).read_text()
    assert "<th>last<th>lowest<th>highest<tr><td>ema<td>3.062<td>1.25<td>3.062</table>" in text


def test_the_monitored_metric_comes_first_and_one_that_is_not_logged_is_said(tmp_path: Path) -> None:
    class Two(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            super().validation_step(batch, batch_idx)
            self.log("val/acc", 0.5)

    report = Report("val/acc")
    fitted(tmp_path, [report], Two())
    assert re.findall("<h3>(val/.*?)</h3>", Path(str(report.path)).read_text()) == ["val/acc", "val/loss"]
    with pytest.warns(UserWarning, match=r"nothing logged `monitor='val/f1'`. Logged were val/loss, val/acc"):
        fitted(tmp_path, [Report("val/f1")], Two())


def test_a_metric_of_training_may_come_first(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    report = Report("train/loss")
    fitted(tmp_path, [report], limit_val_batches=0)
    assert re.findall("<h3>(.*?)</h3>", Path(str(report.path)).read_text())[0] == "train/loss"
    assert not [each for each in recwarn if "Report" in str(each.message)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"monitor": "val/x"}, "`mode` of Report must be given for 'val/x'"),
        ({"mode": "min"}, "`mode` says which values of `monitor`"),
        ({"monitor": "val/loss", "mode": "best"}, "`mode` must be"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        Report(**arguments)


NASTY = "<script>alert('&\"')</script>/a b"


def test_names_with_marks_of_html_are_shown_as_they_are(tmp_path: Path) -> None:
    class Named(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log(NASTY, 1.0)
            self.log("val//loss/ü", 2.0)

    report = Report()
    fitted(tmp_path, [EMA(0.5, name="e-m.a_2"), report], Named(), logger=CSVLogger(tmp_path, "<b>&", "1"))
    parsed = Parsed(text := Path(str(report.path)).read_text())
    assert {NASTY, "val//loss/ü", "e-m.a_2", "<b>&/1"} <= set(parsed.shown)
    assert parsed.tags.count("script") == 1
    assert not [tag for tag in parsed.tags if tag in ("b", "img", "link")]
    assert points(read(Path(str(report.path)))[0], NASTY, "e-m.a_2") == [(3, 1.0), (7, 1.0), (11, 1.0)]
    assert "</script>" not in text.partition('id="runs">')[2].partition("</script>")[0]


ODD = [
    [math.nan] * 3,
    [1.0, math.nan, 3.0],
    [math.inf, 1.0, 2.0],
    [1e308, -1e308, 0.0],
    [5.0] * 3,
    [1e-320, 0.0, 1.0],
    [-1e12, 3e-9, 7.0],
]


@pytest.mark.parametrize("values", ODD, ids=str)
def test_whatever_a_metric_is_there_is_a_page(values: list[float], tmp_path: Path) -> None:
    class Odd(Net):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val/loss", torch.tensor(values[self.current_epoch], dtype=torch.float64))

    report = Report()
    fitted(tmp_path, [EMA(0.5), report], Odd())
    record = written(report)
    found = [value for _, value in points(record, "val/loss", "ema")]
    assert found == pytest.approx(torch.tensor(values).tolist(), nan_ok=True)  # Lightning logs in float32
    text = Path(str(report.path)).read_text()
    Parsed(text)
    assert not re.search(r'(?:d|x|y|cx|cy)="[^"]*(nan|inf)', text)
    content = text.partition('id="runs">')[2].partition("</script>")[0]
    json.loads(content, parse_constant=lambda constant: pytest.fail(f"{constant} is no JSON"))


# ---- where it is written, and when not


def test_it_lies_in_the_folder_of_the_logger_and_needs_nothing_else(tmp_path: Path) -> None:
    report = Report()
    fit = fitted(tmp_path, [EMA(0.5), report], logger=CSVLogger(tmp_path, "mine"))
    assert report.path == str(Path(fit.log_dir) / NAME)
    text = Path(report.path).read_text()
    assert Parsed(text).fetched == []
    assert "http" not in text
    assert re.search(r"url\(|@import", text) is None


def test_nothing_is_written_by_a_fast_run(tmp_path: Path) -> None:
    report = Report()
    fitted(tmp_path, [EMA(0.5), report], fast_dev_run=3)
    assert report.path is None
    assert not list(tmp_path.rglob(NAME))


class Fails(pl.Callback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Any, *rest: Any) -> None:
        if trainer.global_step == self.step:
            raise self.error


@pytest.mark.parametrize("error", [RuntimeError("of the user"), KeyboardInterrupt()], ids=repr)
def test_a_fit_that_failed_has_its_page(error: BaseException, tmp_path: Path) -> None:
    report = Report()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fitted(tmp_path, [EMA(0.5), report, Fails(6, error)])
    record = written(report)
    assert record.notes == [f"The fit ended with {type(error).__name__} at step 5."]
    assert [step for step, _ in points(record, "val/loss", "ema")] == [3]
    assert record.ages["ema"].mass


def test_a_folder_that_takes_no_file_is_a_warning(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).mkdir()
    report, ema = Report(), EMA(0.5)
    with pytest.warns(UserWarning, match="Report was not written, since IsADirectoryError"):
        fitted(tmp_path / "run", [ema, report])
    assert ema.ready
    assert report.path is None


# ---- a run that goes on


def test_a_resumed_run_shows_the_whole_run(tmp_path: Path) -> None:
    def whole_or_not(epochs: int, name: str, path: Path | None = None) -> Record:
        report = Report("val/loss")
        saver = ModelCheckpoint(tmp_path / name, filename="last", every_n_epochs=1)
        callbacks = [EMA(0.5), SWA(start_epoch=0), report, saver]
        fit = trainer(tmp_path / name, callbacks, max_epochs=epochs, log_every_n_steps=2)
        fit.fit(Net(), batches(), validation(), ckpt_path=path)
        record = written(report)
        record.title = ""
        return record

    whole = whole_or_not(4, "whole")
    whole_or_not(2, "parts")
    resumed = whole_or_not(4, "parts", tmp_path / "parts" / "last.ckpt")
    assert resumed == whole


def test_a_second_fit_goes_on_and_a_new_one_begins_anew(tmp_path: Path) -> None:
    report, network, ema = Report(), Net(), EMA(0.5)
    fit = trainer(tmp_path, [ema, report], max_epochs=2, log_every_n_steps=2)
    fit.fit(network, batches(), validation())
    fit.fit_loop.max_epochs = 3
    fit.fit(network, batches(), validation())
    assert [step for step, _ in points(written(report), "val/loss", "ema")] == [3, 7, 11]
    fitted(tmp_path, [EMA(0.5, name="other"), report], max_epochs=1)
    record = written(report)
    assert record.measured.keys() == {"val/loss"}
    assert list(record.measured["val/loss"]) == ["other"]
    assert (list(record.about), list(record.ages), list(record.health["updates"])) == (["other"], ["other"], ["other"])


def test_metrics_weights_and_random_numbers_are_those_without(tmp_path: Path) -> None:
    def outcome(*more: Any) -> tuple[Any, ...]:
        torch.manual_seed(0)
        network = Net(norm=True)
        fit = trainer(tmp_path, [EMA(0.5), *more], max_epochs=2, log_every_n_steps=1)
        fit.fit(network, batches(shuffle=True), validation())
        weights = {name: t.tolist() for name, t in network.state_dict().items()}
        return weights, {k: float(v) for k, v in fit.callback_metrics.items()}, torch.rand(1).item()

    assert outcome(Report()) == outcome()


def test_other_judges_measure_and_the_page_tells_which_weights(tmp_path: Path) -> None:
    report = Report("val/loss")
    fitted(tmp_path, [EMA(0.9, validate="raw"), AcceptIfBetter("val/loss", shares=(0.5,)), report])
    record = written(report)
    assert [step for step, _ in points(record, "val/loss", "raw")] == [3, 7, 11]
    assert [step for step, _ in points(record, "val/loss", "ema")] == [12]


def test_several_loaders_and_validations_within_an_epoch(tmp_path: Path) -> None:
    class Two(Net):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int) -> None:
            self.log("val/loss", self.loss(batch))

    report = Report("val/loss/dataloader_idx_1")
    fit = trainer(tmp_path, [EMA(0.5, validate="both"), report], max_epochs=1, val_check_interval=2)
    fit.fit(Two(), batches(), [validation(), validation()])
    record = written(report)
    assert list(record.measured) == ["val/loss/dataloader_idx_0", "val/loss/dataloader_idx_1"]
    for of in ("raw", "ema"):
        assert [step for step, _ in points(record, "val/loss/dataloader_idx_1", of)] == [1, 3]


# ---- several processes


def two_processes(root: Path) -> dict[str, Any]:
    class Sums(Wide):  # type: ignore[misc]
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            self.log("train/sum", loss.detach(), on_step=True, on_epoch=True, sync_dist=True, reduce_fx="sum")
            return loss

    report = Report("val/loss")
    run = fit(root, [EMA(0.5, validate="both"), report], Sums(), ddp(), max_epochs=2, log_every_n_steps=2)
    return {"path": report.path, "metrics": {key: float(value) for key, value in run.callback_metrics.items()}}


@pytest.mark.multiprocess
def test_the_first_of_several_processes_writes(tmp_path: Path) -> None:
    first, second = launch(2, two_processes, tmp_path)
    assert (first["path"], second["path"]) == (str(tmp_path / NAME), None)
    (record,) = read(tmp_path / NAME)
    assert points(record, "val/loss", "ema")[-1][1] == pytest.approx(first["metrics"]["val/loss"])
    assert points(record, "val/loss", "raw")[-1][1] == pytest.approx(first["metrics"]["raw/val/loss"])
    assert record.trained["train/sum_epoch"]["raw"].drawn()[-1][1] == pytest.approx(first["metrics"]["train/sum_epoch"])
    assert [step for step, _ in record.health["distance"]["ema"].drawn()] == [1, 3, 5, 7]


@pytest.mark.multiprocess
def test_it_comes_back_from_processes_of_a_fit(tmp_path: Path) -> None:
    report = Report()
    fitted(tmp_path, [EMA(0.5), report], strategy="ddp_fork", devices=2, max_epochs=1)
    assert report.path == str(tmp_path / NAME)
    assert list(report._record.measured["val/loss"]) == ["ema"]


# ---- several runs, on a desk and on a phone


def made(tmp_path: Path, name: str, make: Callable[[], list[Any]], **settings: Any) -> Path:
    report = Report("val/loss")
    fitted(tmp_path / name, [*make(), report], Net(lr=0.02), max_epochs=6, **settings)
    return tmp_path / name


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    long = "a-name-without-a-blank-that-is-longer-than-a-phone-is-wide-and-goes-on-and-on"
    return [
        made(tmp_path, "first", lambda: [EMA(0.5), SWA(start_epoch=1), LAWA(k=2, every_n_steps=2)]),
        made(tmp_path, "second", lambda: [EMA(0.9), EMA(0.99, name=long)]),
    ]


def test_several_runs_over_each_other(runs: list[Path], run: Callable[..., Any]) -> None:
    code, out, _ = run("report", runs[0].parent, "--out", "both.html")
    assert (code, out.strip()) == (0, "2 runs: both.html")
    assert [record.title for record in read(Path("both.html"))] == ["first", "second"]
    assert {"first: lawa", "second: ema"} <= set(Parsed(Path("both.html").read_text()).shown)
    Path("again.html").write_text(Path("both.html").read_text())
    assert run("report", "both.html", "both.html", "again.html", "--out", "four.html")[0] == 0
    assert [record.title for record in read(Path("four.html"))] == ["first", "second", "first (2)", "second (2)"]
    assert run("report", runs[0], "--out", "one.html")[0] == 0
    assert [record.title for record in read(Path("one.html"))] == [str(runs[0])]


@pytest.mark.parametrize(
    ("folders", "titles"),
    [
        (("logs/a/version_0", "logs/b/version_0"), ["a", "b"]),
        (("logs/a/version_0", "logs/a/version_1"), ["version_0", "version_1"]),
        (("logs/a", "logs/a/b"), ["a", "a/b"]),
    ],
    ids=str,
)
def test_runs_are_called_by_what_tells_them_apart(folders: tuple[str, ...], titles: list[str]) -> None:
    assert _titles([Path(folder) / NAME for folder in folders]) == titles


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], f"there is no {NAME} in or below nowhere"),
        (["nowhere"], "A run that was killed has its curves in its checkpoints"),
        ([NAME, "--out", "."], "is a folder: name a file in it"),
        (["other.html"], "other.html is no report"),
        ([NAME, "--out", NAME], "`--out` must be another file"),
    ],
    ids=str,
)
def test_what_is_no_report_is_named(arguments: list[str], message: str, run: Callable[..., Any]) -> None:
    Path("other.html").write_text("<p>hello")
    Path(NAME).write_text(page([Record("one")]))
    code, _, err = run("report", *arguments)
    assert code == 2
    assert message in err


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_nothing_is_wider_than_a_phone_and_nothing_is_complained_of(
    runs: list[Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    run("report", *runs, "--out", tmp_path / "both.html")
    browser = Browser(tmp_path / "profile")
    try:
        for width in (PHONE, 1200):
            browser.resize(width)
            for each in (*(folder / NAME for folder in runs), tmp_path / "both.html"):
                browser.open(each.as_uri())
                assert browser.run("document.documentElement.scrollWidth") <= width, each
                assert browser.run("document.querySelectorAll('figure').length") >= 5
                letters = "[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height)"
                assert browser.run(f"Math.min(...{letters})") >= 11, "a phone shows them too small"
        assert browser.errors == []
    finally:
        browser.close()
