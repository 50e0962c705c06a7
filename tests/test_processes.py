"""What processes that go wrong are said to have done, and how those of no fault end."""

import atexit
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from processes import launch, returned, start

pytestmark = pytest.mark.multiprocess


def second(root: Path, act: Any) -> None:
    """The second of two processes acts."""
    if os.environ["RANK"] == "1":
        act()


def fails() -> None:
    raise OSError("a batch cannot be read")


def test_the_error_of_a_process_is_shown_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"rank 1 ended with 1:(?s:.*)in fails(?s:.*)a batch cannot be read"):
        launch(2, second, tmp_path, fails)


def test_a_process_that_is_killed_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="rank 1 ended with -9"):
        launch(2, second, tmp_path, lambda: os.kill(os.getpid(), signal.SIGKILL))


def test_a_process_that_hangs_is_killed_and_named(tmp_path: Path) -> None:
    processes = start(2, second, tmp_path, lambda: time.sleep(600))
    with pytest.raises(AssertionError, match="rank 1 did not end"):
        returned(processes, tmp_path, seconds=1.0)
    assert not any(process.is_alive() for process in processes)


def summed(root: Path) -> float:
    atexit.register(os.abort)  # as threads that are torn down with the interpreter do now and then
    threading.Thread(target=time.sleep, args=(600,)).start()  # an ordinary exit waits for it
    dist.init_process_group("gloo")
    number = torch.tensor(float(os.environ["RANK"]))
    dist.all_reduce(number)
    return number.item()


def test_processes_that_have_their_results_end_without_tearing_anything_down(tmp_path: Path) -> None:
    assert launch(2, summed, tmp_path) == [1.0, 1.0]
    assert launch(2, summed, tmp_path) == [1.0, 1.0]
