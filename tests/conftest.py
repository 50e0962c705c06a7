"""What all tests share; the number of threads is set before anything imports torch."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# The networks of the tests are no faster with several threads, and on busy cores these wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command in an empty folder: exit code, what it printed, what it complained of."""
    from lightning_merge.cli import main

    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return code, *capsys.readouterr()

    return run
