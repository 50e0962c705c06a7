"""What a loader's worker prints when the process that it hands a tensor to was ended first."""

import multiprocessing
import os
import socket
import sys
from contextlib import nullcontext
from multiprocessing import reduction, resource_sharer
from typing import Any

import pytest

from lightning_merge._commands._mistakes import quiet_workers


def _offer(connection: Any) -> None:
    """Offers a file descriptor to another process, as torch does for tensors, and waits."""
    handle: Any = reduction.DupFd(os.open(os.devnull, os.O_RDONLY))
    connection.send(handle._id[0])
    connection.recv()
    resource_sharer.stop(timeout=1)


@pytest.mark.parametrize("quiet", [True, False])
def test_a_worker_whose_tensor_is_not_fetched_prints_no_traceback(
    quiet: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    here, there = multiprocessing.Pipe()
    with quiet_workers() if quiet else nullcontext():
        worker = multiprocessing.get_context("fork").Process(target=_offer, args=(there,))
        worker.start()
    address = here.recv()
    for _ in range(3):
        with socket.socket(socket.AF_UNIX) as fetching:
            fetching.connect(address)
            fetching.recv(1)  # broken off, as by Ctrl-C, in the middle of the greeting
    here.send(None)
    worker.join(10)
    assert worker.exitcode == 0
    assert ("Traceback" in capfd.readouterr().err) is not quiet


def test_errors_of_the_process_itself_are_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_workers():
        sys.excepthook(ConnectionResetError, ConnectionResetError("of its own"), None)
    assert "of its own" in capfd.readouterr().err
