"""A stream that is killed goes on where it was, and ends as if nothing had happened."""

import subprocess
import sys
from pathlib import Path

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "continual_resume.py"


def test_killed_streams_end_bit_for_bit_as_uninterrupted_ones() -> None:
    """One point of each kind; the whole sweep is the benchmark's own command."""
    options = ["--methods", "magmax", "--points", "4", "--seed", "1"]
    done = subprocess.run([sys.executable, str(BENCHMARK), *options], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "4 of 4 resumed streams equal the uninterrupted one bit for bit" in done.stdout
