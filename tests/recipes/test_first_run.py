"""What a new user sees first: few lines, each explained, with figures that were measured."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from rich.progress import Progress

from lightning_merge.recipes._progress import OneLineProgressBar

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "first-run.md"
OF_LIGHTNING = ("Seed set to", "GPU available", "TPU available", "`Trainer.fit` stopped", "Epoch ")


def shape(line: str) -> str:
    """A line without its figures, its folder, and the word that depends on them."""
    line = re.sub(r"\S*/version_\d+", "RUN", line)
    line = re.sub(r"is (better than|worse than|not clearly different from|the same as) raw( by)?", "is W raw", line)
    line = re.sub(r"[━╸╺]+(?= \d)", "BAR", line)
    return " ".join(re.sub(r"[+-]?\d[\d.,]*\d(e-\d+)?|[+-]?\d", "N", re.sub(r"[━─]+", "─", line)).split())


def test_every_line_of_a_first_run_is_on_its_page_and_ours_are_few(tmp_path: Path) -> None:
    short = ["--trainer.max_epochs=4", f"--trainer.default_root_dir={tmp_path / 'runs'}"]
    done = subprocess.run(
        [sys.executable, "-m", "lightning_merge", "run", "digits/swa", *short],
        cwd=tmp_path,
        env={**os.environ, "COLUMNS": "150"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    printed = [line for line in done.stdout.splitlines() if line.strip()]
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    explained = {shape(line) for block in blocks for line in block.splitlines()}
    found = {shape(line) for line in printed}
    assert found - explained == set()
    assert {line for line in explained - found if not line.startswith("Epoch")} == set()
    ours = [line for line in printed if not line.startswith(OF_LIGHTNING)]
    assert 8 < len(ours) <= 20


def test_the_bar_stays_on_one_line_whatever_is_logged() -> None:
    bar = OneLineProgressBar()
    text = StringIO()
    progress = Progress(*bar.configure_columns(None), console=Console(file=text, width=80, force_terminal=True))  # type: ignore[arg-type]
    task = progress.add_task("Epoch 39/39", total=28, completed=28)
    bar._metrics.text = " ".join(f"raw/val/metric_{n} 0.123" for n in range(9))
    progress.console.print(progress.get_renderable())
    assert len(text.getvalue().strip().splitlines()) == 1
    assert "raw/val/metric_0" in text.getvalue()
    progress.update(task, description="Sanity Checking")
    progress.console.print(progress.get_renderable())
    assert "metric" not in text.getvalue().strip().splitlines()[1]


def test_metrics_of_the_bar_leave_out_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    bar = OneLineProgressBar()
    monkeypatch.setattr(
        "lightning.pytorch.callbacks.RichProgressBar.get_metrics", lambda *_: {"v_num": 3, "val/acc": 0.98765}
    )
    assert bar.get_metrics(SimpleNamespace(), SimpleNamespace()) == {}  # type: ignore[arg-type]
    assert bar._metrics.text == "val/acc 0.988"


@pytest.fixture(scope="module")
def maker() -> Any:
    specification = importlib.util.spec_from_file_location("make_first_run", ROOT / "docs" / "make_first_run.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_what_to_expect_is_what_was_measured(maker: Any) -> None:
    for path in (ROOT / "README.md", PAGE):
        assert maker.block() in path.read_text(encoding="utf-8"), "run `python docs/make_first_run.py`"
    assert maker.expect() in (ROOT / "recipes" / "digits" / "swa.yaml").read_text(encoding="utf-8")


def test_the_first_run_makes_a_clear_difference(maker: Any) -> None:
    found = json.loads(maker.RESULTS.read_text(encoding="utf-8"))
    assert len(found["runs"]) >= 5
    assert found["summary"]["gain_in_standard_errors"]["lowest"] > 3
    assert {run["seed"] for run in found["runs"]} == set(range(len(found["runs"])))
    assert os.path.basename(found["command"].split()[0]) == "first_run.py"


def test_help_of_a_recipe_begins_with_its_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    from lightning_merge.cli import main

    assert main(["run", "digits/swa", "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "usage: lightning-merge run digits/swa [--option value] ..."
    at = {line.strip(): number for number, line in enumerate(lines)}
    own, callback = at["--trainer.max_epochs 20"], at["--trainer.callbacks.start_epoch 0.75"]
    assert at["Settings of this recipe:"] < own < at["--data.batch_size 32"] < callback
    assert at["--model.optimizer.lr 0.1"] < callback
    assert lines[callback + 1].strip().startswith("Completed epochs at which the first weights")
    assert any("lightning-merge run digits/swa --help all" in line for line in lines[-2:])
    assert len(lines) < 120


def test_help_has_every_setting_that_a_recipe_makes_and_each_is_taken() -> None:
    import yaml

    from lightning_merge.recipes._catalog import recipes, whole
    from lightning_merge.recipes._help import recipe_help

    for name in recipes():
        if name.startswith(("digits/", "continual/")):
            text, config = recipe_help(name), yaml.safe_load(whole(name))
            assert f"--trainer.max_epochs {config['trainer']['max_epochs']}" in text
            for key in config["model"]["init_args"]:
                assert f"--model.{key} " in text, name
