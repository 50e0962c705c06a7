"""A run that is killed goes on where its last file says, and ends as if nothing had happened."""

import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_merge.callbacks import EMA, RandomState

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "resume.py"


def test_killed_runs_resume_to_the_bit_identical_end() -> None:
    """Three points per method, one of each kind; the whole sweep is the benchmark's own command."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--points", "3", "--seed", "1"], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "resumed runs equal the uninterrupted one bit for bit" in done.stdout


def test_a_truncated_file_is_named_together_with_a_good_one(tmp_path: Path) -> None:
    files = ModelCheckpoint(tmp_path, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    tiny.trainer(tmp_path, [EMA(decay=0.5), files], max_epochs=1).fit(tiny.Net(), tiny.batches())
    good, cut = tmp_path / "step=2.ckpt", tmp_path / "step=4.ckpt"
    cut.write_bytes(cut.read_bytes()[:-100])
    with pytest.raises(RuntimeError, match="not a complete checkpoint") as error:
        tiny.trainer(tmp_path, [EMA(decay=0.5)], max_epochs=2).fit(tiny.Net(), tiny.batches(), ckpt_path=cut)
    assert str(cut) in str(error.value)
    assert str(good) in str(error.value)
    tiny.trainer(tmp_path, [EMA(decay=0.5)], max_epochs=2).fit(tiny.Net(), tiny.batches(), ckpt_path=good)


def test_random_state_comes_back_from_a_file(tmp_path: Path) -> None:
    callback = RandomState()
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)
    torch.save(callback.state_dict(), tmp_path / "state.pt")
    expected = torch.rand(1).item(), np.random.rand(), random.random()
    callback.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    callback.on_train_start(None, None)  # type: ignore[arg-type]
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
