"""The recipes that start a second process run two steps, as a user starts them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_images import tiny_options

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


@pytest.mark.parametrize("name", ["cifar10/ema-ddp", "cifar10/ema-fsdp2"])
def test_recipe_runs_two_steps_in_two_processes(name: str, tmp_path: Path) -> None:
    command = tmp_path / "lightning-merge"
    command.write_text(COMMAND)
    options = [
        *tiny_options(name, tmp_path),
        "--data.batch_size=2",
        "--trainer.max_epochs=1",
        "--trainer.limit_train_batches=2",
        "--trainer.enable_progress_bar=false",
        f"--trainer.default_root_dir={tmp_path}",
    ]
    done = subprocess.run(
        [sys.executable, str(command), "run", name, *options],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr
    assert re.search(r"│ ema +│ +[01]\.\d+ │ +\d+\.\d+ │", done.stdout), done.stdout
    (final,) = tmp_path.rglob("ema-final.ckpt")
    assert final.is_dir() is (name == "cifar10/ema-fsdp2")
