"""What all tests share; the number of threads is set before anything imports torch."""

import gc
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# The networks of the tests are no faster with several threads, and on busy cores these wait for each other for minutes.
os.environ.setdefault("OMP_NUM_THREADS", "1")


# Collecting makes a million objects that stay, and looking through them again and again took a quarter of it. Frozen,
# they are not looked through while tests run, and forks share their memory.
gc.disable()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first: those that are left at the end are short, and no core waits for another."""
    slow = {item.path for item in items for mark in ("slow", "multiprocess") if item.get_closest_marker(mark)}
    items.sort(key=lambda item: item.path not in slow)


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


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
