"""The table, the sentence and the figure that a run ends with."""

import csv
import re
from copy import deepcopy
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import CSVLogger

from lightning_merge.callbacks import EMA, SWA, Doctor, ForkMerge, PostHocEMA
from lightning_merge.files._read import read
from lightning_merge.recipes import AuxiliaryClassifier, Classifier, Digits, RunReport, SmallConvNet
from lightning_merge.recipes.report._curves import curves_figure, limits
from lightning_merge.recipes.report._page import page
from lightning_merge.recipes.report._path import WeightPath
from lightning_merge.recipes.report._shares import shares_figure


def fit(
    folder: Path,
    *callbacks: Callback,
    epochs: int = 3,
    checkpoint: ModelCheckpoint | None = None,
    kind: type[Classifier] = Classifier,
    **options: Any,
) -> RunReport:
    """Trains for two steps an epoch and returns the report."""
    seed_everything(0)
    report = RunReport()
    trainer = Trainer(
        max_epochs=epochs,
        limit_train_batches=2,
        accelerator="cpu",
        callbacks=[report, checkpoint or ModelCheckpoint(filename="last"), *callbacks],
        logger=CSVLogger(folder, name="", version=""),
        enable_model_summary=False,
        **{"enable_progress_bar": False} | options,
    )
    trainer.fit(kind(SmallConvNet(width=4), num_classes=10), Digits())
    return report


def table(text: str) -> dict[str, list[str]]:
    """The rows of the printed table by their first cell."""
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in text.splitlines() if line[:1] == "│"]
    return {name: cells for name, *cells in rows}


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "150")


def test_a_run_without_an_average_has_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fit(tmp_path)
    out = capsys.readouterr().out
    rows = table(out)
    assert list(rows) == ["raw"]
    assert rows["raw"][0] == f"{report.measured['raw'][6]['val/acc']:.4f}"
    assert rows["raw"][2] == "checkpoints/last.ckpt"
    assert f"Figure:     {tmp_path}/curves.png" in out
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_raw_and_merged_are_what_was_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = fit(tmp_path, SWA(start_epoch=2, validate="both"), epochs=4)
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {key: [float(row[key]) for row in rows if row[key]] for key in ("val/loss", "raw/val/loss")}
    assert list(report.measured["raw"]) == [2, 4, 6, 8]
    assert list(report.measured["swa"]) == [4, 6, 8]  # before it is ready, the plain name is of the raw weights
    assert [p["val/loss"] for p in report.measured["raw"].values()] == logged["raw/val/loss"]
    assert [p["val/loss"] for p in report.measured["swa"].values()] == logged["val/loss"][1:]

    out = capsys.readouterr().out
    cells = table(out)
    assert cells["raw"][1] == f"{logged['raw/val/loss'][-1]:.4f}"
    assert cells["swa"][1] == f"{logged['val/loss'][-1]:.4f}"
    raw, merged = (report.measured[name][8]["val/acc"] for name in ("raw", "swa"))
    assert f"{merged:.2%} against {raw:.2%} val/acc, {100 * (merged - raw):+.2f} points" in out
    assert f"{round(449 * (merged - raw)):+d} of 449 images" in out


def test_the_named_files_hold_the_sets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    average = EMA(decay=0.5)
    fit(tmp_path, average)
    rows = table(capsys.readouterr().out)
    assert rows["ema"][2] == "checkpoints/ema-final.ckpt"
    merged = read(tmp_path / rows["ema"][2])["state_dict"]
    assert all(torch.equal(merged[name], t) for name, t in (average.merged_weights() or {}).items())
    assert rows["raw"][2] == "checkpoints/last.ckpt (to go on training)"
    raw = read(tmp_path / "checkpoints/last.ckpt")["lightning_merge"]["raw"]
    assert all(torch.equal(raw[name], t) for name, t in average.raw_weights().items())


def test_raw_weights_that_were_not_measured_at_the_end_are_not_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = fit(tmp_path, SWA(start_epoch=2, validate="merged"))
    assert list(report.measured["raw"]) == [2]  # before there was an average
    out = capsys.readouterr().out
    assert table(out)["raw"][:2] == ["not measured", "not measured"]
    assert "`validate: both` on swa measures them" in out


def test_average_that_validation_leaves_out_is_measured_at_the_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    average = EMA(decay=0.5, validate="raw")
    report = fit(tmp_path, average)
    assert list(report.measured["raw"]) == [2, 4, 6]
    assert list(report.measured["ema"]) == [6]
    rows = table(capsys.readouterr().out)
    assert rows["ema"][1] == f"{average.final_metrics['val/loss']:.4f}" != rows["raw"][1]


def test_several_averages_have_a_row_and_a_sentence_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, EMA(decay=0.5, validate="both"), EMA(decay=0.9, name="slow"), SWA(start_epoch=9))
    out = capsys.readouterr().out
    rows = table(out)
    assert list(rows) == ["raw", "ema", "slow", "swa"]
    assert "ema " in out
    assert "slow " in out
    assert rows["swa"] == ["not measured", "not measured", "none"]
    assert "swa merged nothing in this run." in out


def test_a_run_without_validation_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, EMA(decay=0.5), limit_val_batches=0)
    out = capsys.readouterr().out
    assert "ema was not measured: there was no validation." in out
    assert "Figure" not in out
    assert not (tmp_path / "curves.png").exists()


def test_fast_dev_run_leaves_no_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, EMA(decay=0.5), fast_dev_run=True, default_root_dir=tmp_path)
    assert "raw" in table(capsys.readouterr().out)
    assert not list(tmp_path.rglob("*.png"))


def test_a_resumed_run_shows_its_whole_curves(tmp_path: Path) -> None:
    first = fit(tmp_path / "a", epochs=2)
    again = RunReport()
    trainer = Trainer(
        max_epochs=3,
        limit_train_batches=2,
        accelerator="cpu",
        callbacks=[again],
        logger=CSVLogger(tmp_path / "b"),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = tmp_path / "a/checkpoints/last.ckpt"
    trainer.fit(Classifier(SmallConvNet(width=4), num_classes=10), Digits(), ckpt_path=str(last))
    assert list(again.measured["raw"]) == [2, 4, 6]
    assert again.measured["raw"][2] == first.measured["raw"][2]


def test_figure_shows_both_curves_and_the_averaging_window() -> None:
    curves = {"raw": [(2, 0.5), (4, 0.7), (6, 0.6)], "swa": [(4, 0.7), (6, 0.8)]}
    axes = curves_figure(curves, {"swa": (4, 6)}, "val/acc", 6).axes[0]
    drawn = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}  # type: ignore[union-attr]
    assert drawn == {name: [list(point) for point in points] for name, points in curves.items()}
    (window,) = axes.patches
    assert (window.get_x(), window.get_width()) == (4, 2)  # type: ignore[attr-defined]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["raw", "swa", "swa takes weights in (steps 4 to 6)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer steps", "val/acc")


def test_range_of_the_figure_leaves_early_values_out_and_last_ones_in() -> None:
    late = [0.1, 0.2] + [0.97, 0.98, 0.99] * 4
    low, high = limits([late])
    assert 0.9 < low < 0.97
    assert 0.99 < high <= 1.01
    low, _ = limits([[*late, 0.9]])
    assert low < 0.9


def test_file_of_an_earlier_step_is_not_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit(tmp_path, checkpoint=ModelCheckpoint(every_n_epochs=2))
    assert table(capsys.readouterr().out)["raw"][2] == "none"


def test_file_with_objects_of_the_user_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Odd(Callback):
        def state_dict(self) -> dict[str, Any]:
            return {"odd": tmp_path}

    fit(tmp_path, Odd())
    assert table(capsys.readouterr().out)["raw"][2] == "checkpoints/last.ckpt"


def test_validation_after_the_fit_changes_nothing(tmp_path: Path) -> None:
    report = RunReport()
    model, data = Classifier(SmallConvNet(width=4), num_classes=10), Digits()
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    average = EMA(decay=0.9, validate="both")
    trainer = Trainer(
        max_epochs=1,
        limit_train_batches=2,
        accelerator="cpu",
        callbacks=[report, average],
        default_root_dir=tmp_path,
        enable_progress_bar=False,
        **options,
    )
    trainer.fit(model, data)
    before = deepcopy(report.measured)
    trainer.validate(Classifier(SmallConvNet(width=4), num_classes=10), data, verbose=False)
    assert report.measured == before


def test_progress_bar_ends_before_averages_say_their_last(tmp_path: Path) -> None:
    seen = []

    class Bar(ProgressBar):
        ended = False

        def disable(self) -> None: ...

        def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
            self.ended = True

    class Later(Callback):
        def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
            seen.append(trainer.progress_bar_callback.ended)  # type: ignore[union-attr]

    fit(tmp_path, Later(), Bar(), enable_progress_bar=True, epochs=1)
    assert seen == [True]


def test_every_rank_is_asked_for_the_folder_and_one_reports(capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    class OtherRank:
        progress_bar_callback = None
        is_global_zero = False

        @property
        def log_dir(self) -> str:
            asked.append(self)  # a broadcast, which hangs unless all ranks take part
            return "runs"

    RunReport().on_fit_end(OtherRank(), None)  # type: ignore[arg-type]
    assert len(asked) == 1
    assert capsys.readouterr().out == ""


# ---- the page


def test_page_holds_table_curves_verdict_and_way_and_needs_nothing_else(tmp_path: Path) -> None:
    doctor = Doctor(points=1)
    report = fit(tmp_path, doctor, SWA(start_epoch=2, validate="both"), epochs=4)
    page = (tmp_path / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == page.count("<img ") == 3
    assert not re.search(r"https?://|<script|<link", page)
    assert "<h2>Is swa sound?</h2>" in page
    assert "<h2>The way of the weights</h2>" in page
    assert doctor.examinations["swa"].verdict in page
    for name in ("raw", "swa"):
        assert f"<td class=number>{report.measured[name][8]['val/acc']:.4f}</td>" in page
    assert HTMLParser().feed(page) is None
    for tag in ("table", "p", "h2", "body", "tr", "td"):
        assert len(re.findall(rf"<{tag}[ >]", page)) == page.count(f"</{tag}>"), tag


def test_page_shows_which_width_would_have_been_best(tmp_path: Path) -> None:
    fit(tmp_path, Doctor(points=1), PostHocEMA(every=2), limit_val_batches=1)
    text = (tmp_path / "report.html").read_text()
    assert "<h2>Which width of posthoc-ema would have been best?</h2>" in text
    assert 'alt="loss of posthoc-ema by its width"' in text


def test_text_on_the_page_is_escaped() -> None:
    text = page("<b>run", ["weights", "a"], [["<i>", "1", "f"]], ["<s>"], [("<u>", "<hr>")])
    assert all(part in text for part in ("&lt;b&gt;run", "&lt;i&gt;", "&lt;s&gt;", "&lt;u&gt;", "<hr>"))


def test_a_run_without_doctor_or_average_has_a_page_all_the_same(tmp_path: Path) -> None:
    fit(tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert "sound?" not in text
    assert text.count("<img ") == 2


def test_figure_shows_the_shares_of_every_merge_and_what_they_scored() -> None:
    history = [
        {"shares": {"alone": 0.75, "joint": 0.25}, "previous": False, "score": 0.5},
        {"shares": {"alone": 0.0, "joint": 0.0}, "previous": True, "score": 0.5},
        {"shares": {"alone": 0.0, "joint": 1.0}, "previous": False, "score": 0.75},
    ]
    above, below = shares_figure(history).axes
    drawn = {
        str(bars.get_label()): [
            (round(bar.get_x() + bar.get_width() / 2), bar.get_y(), bar.get_height()) for bar in bars
        ]
        for bars in above.containers
    }
    assert drawn == {
        "alone": [(1, 0, 0.75), (2, 0, 0), (3, 0, 0)],
        "joint": [(1, 0.75, 0.25), (2, 0, 0), (3, 0, 1)],
        "the last merge was kept": [(2, 0, 1)],
    }
    (line,) = below.lines
    assert line.get_xydata().tolist() == [[1, 0.5], [2, 0.5], [3, 0.75]]  # type: ignore[union-attr]
    assert len(shares_figure(history[:1]).axes[0].containers) == 2


def test_page_shows_what_forkmerge_merged(tmp_path: Path) -> None:
    branches = {"alone": {"target": 1.0}, "joint": {"target": 1.0, "rotation": 1.0}}
    fork = ForkMerge(branches, every_n_steps=2, heads=["rotation.*", "noise.*"])
    fit(tmp_path, fork, kind=AuxiliaryClassifier, epochs=2, limit_val_batches=1)
    assert len(fork.history) == 2
    text = (tmp_path / "report.html").read_text()
    assert "<h2>What forkmerge merged</h2>" in text
    assert 'alt="share of each branch in each merge"' in text


def test_a_validation_that_only_looks_is_not_taken_down(tmp_path: Path) -> None:
    """The last epoch is not validated, so the raw weights of the end are not measured, whatever a doctor does."""
    report = fit(tmp_path, Doctor(points=1), EMA(decay=0.5, validate="merged"), epochs=3, check_val_every_n_epoch=2)
    assert list(report.measured.get("raw", {})) == []
    assert list(report.measured["ema"]) in ([4], [4, 6])


def test_points_of_the_way_stay_evenly_spread_and_few() -> None:
    way, module = WeightPath(), torch.nn.Linear(3, 2)
    for step in range(1, 1001):
        with torch.no_grad():
            module.weight.fill_(step)
        way.add(module, step)
    steps = list(way.points)
    assert 100 <= len(steps) <= 200
    assert {after - before for before, after in pairwise(steps)} == {8}
    assert all(point.max() == step for step, point in way.points.items())


def test_the_plane_is_that_of_the_path_and_averages_lie_on_it() -> None:
    way, module = WeightPath(), torch.nn.Linear(40, 200)  # more than are kept
    directions = torch.randn(2, 200, 40)
    start = module.weight.detach().clone()

    def at(x: float, y: float) -> torch.Tensor:
        return start + x * directions[0] + y * directions[1]

    corners = [(0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 2.0)]
    for step, corner in enumerate(corners):
        with torch.no_grad():
            module.weight.copy_(at(*corner))
        way.add(module, step)
    path, placed, held = way.plane({"mean": {"weight": at(0.5, 0.75)}})
    assert held == pytest.approx(1.0)
    assert torch.allclose(placed["mean"], path.mean(0), atol=1e-4)
    assert 4000 < len(way.points[0]) < 4200
