"""The recipes that start a second process run two steps."""

import contextlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from processes import launch
from tiny_images import tiny_options

from lightning_merge.cli import main

pytestmark = pytest.mark.multiprocess

COMMAND = """
import os
import sys
from lightning_merge.cli import main

code = main()
sys.stdout.flush()
sys.stderr.flush()
os._exit(code)
"""
"""What an installation writes, but for its end: ``processes.py`` says why."""
TABLE = r"│ ema +│ +[01]\.\d+ │ +\d+\.\d+ │"


def command(name: str, folder: Path) -> list[str]:
    return [
        "run",
        name,
        *tiny_options(name, folder),
        "--data.batch_size=2",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={folder}",
    ]


def test_the_recipe_of_ddp_starts_its_second_process(tmp_path: Path) -> None:
    script = tmp_path / "lightning-merge"
    script.write_text(COMMAND)
    done = subprocess.run(
        [sys.executable, str(script), *command("cifar10/ema-ddp", tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    assert re.search(TABLE, done.stdout), done.stdout
    (final,) = tmp_path.rglob("ema-final.ckpt")
    assert final.is_file()


def as_under_torchrun(root: Path, arguments: list[str]) -> tuple[int, str]:
    """The exit code, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        return main(arguments), printed.getvalue()


def test_the_recipe_of_fsdp2_runs_in_processes_that_are_there(tmp_path: Path) -> None:
    arguments = command("cifar10/ema-fsdp2", tmp_path)
    (first, printed), (second, _) = launch(2, as_under_torchrun, tmp_path, arguments)
    assert (first, second) == (0, 0)
    assert re.search(TABLE, printed), printed
    (final,) = tmp_path.rglob("ema-final.ckpt")
    assert final.is_dir()
