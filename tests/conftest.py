"""What all tests share; the number of threads is set before anything imports torch."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The networks of the tests are no faster with several threads, and on busy cores these wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="session")
def _autograd_starts_no_threads() -> None:
    """The first backward pass looks for devices, and with threads for one no fork could train any more.

    So it comes before the tests that feign a GPU.
    """
    if torch := sys.modules.get("torch"):
        torch.ones((), requires_grad=True).backward()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """A process per core where folders are tested; files that are named are tested in this process, at once."""
    return min(os.cpu_count() or 1, 8) if all(Path(argument).is_dir() for argument in config.args) else 0


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
