"""A stream that is killed goes on where it was, and ends as if nothing had happened."""

from pathlib import Path

import scripts

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "continual_resume.py"


def test_killed_streams_end_bit_for_bit_as_uninterrupted_ones(tmp_path: Path) -> None:
    """One point of each kind; the whole sweep is the benchmark's own command."""
    code, printed = scripts.start(BENCHMARK, "--methods", "magmax", "--points", 4, "--seed", 1, folder=tmp_path).finish(
        600
    )
    assert code == 0, printed
    assert "4 of 4 resumed streams equal the uninterrupted one bit for bit" in printed
