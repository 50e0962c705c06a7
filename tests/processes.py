"""Several processes that each run a function, forked from this one and set up as ``torchrun`` sets up its own.

A process leaves by ``os._exit`` once all have their results: at an ordinary exit torch's threads are torn down together
with the interpreter, and now and then that aborts a process that had done all its work.
"""

import importlib
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ON_THE_WAY = (
    "fsspec.implementations.local",
    "omegaconf",
    "torch.distributed.algorithms",
    "torch.distributed.checkpoint",
    "torch.distributed.elastic.multiprocessing",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
)
"""What a fit imports on its way."""

DEADLINE = 300.0
"""Seconds after which a process that has not ended counts as hanging, also on a busy machine."""


def launch(world: int, work: Callable[..., Any], root: Path, *arguments: Any) -> list[Any]:
    """What ``work(root, *arguments)`` returned in each process."""
    return returned(start(world, work, root, *arguments), root)


def returned(processes: list[Any], root: Path, seconds: float = DEADLINE) -> list[Any]:
    """What each of the processes that ``start`` began in this folder returned, once all have ended."""
    hanging = _hanging(processes, seconds)
    told = [_told(process.exitcode, root / f"error{rank}.txt") for rank, process in enumerate(processes)]
    wrong = [f"rank {rank} {'did not end' if rank in hanging else said}" for rank, said in enumerate(told) if said]
    assert not wrong, "\n".join(wrong)
    return [torch.load(root / f"rank{rank}.pt", weights_only=False) for rank in range(len(processes))]


@cache
def warm_up() -> None:
    """Once, and not in each process: imports, and what Python and torch find out at the first fit."""
    for name in ON_THE_WAY:
        importlib.import_module(name)
    if "lightning" not in sys.modules:
        return
    from lightning.pytorch import Trainer
    from lightning.pytorch.demos.boring_classes import BoringModel

    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    state = torch.get_rng_state()
    Trainer(accelerator="cpu", devices=1, fast_dev_run=1, **quiet).fit(BoringModel())
    torch.set_rng_state(state)


def start(world: int, work: Callable[..., Any], root: Path, *arguments: Any) -> list[Any]:
    warm_up()
    root.mkdir(exist_ok=True, parents=True)
    context = multiprocessing.get_context("fork")
    # The first process's store listens on this socket: no other program can take its port in between.
    with socket.create_server(("127.0.0.1", 0)) as listener:
        processes = [
            context.Process(target=_run, args=(rank, world, listener, work, root, arguments), daemon=True)
            for rank in range(world)
        ]
        for process in processes:
            process.start()
    return processes


def wait(processes: list[Any], seconds: float = DEADLINE) -> None:
    """Until all have ended; one that does not is killed, and that is an error."""
    hanging = _hanging(processes, seconds)
    assert not hanging, f"{len(hanging)} of {len(processes)} processes did not end in {seconds} s"


def _hanging(processes: list[Any], seconds: float) -> list[int]:
    """The ranks that had to be killed."""
    end = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hanging:
        processes[rank].kill()
        processes[rank].join()
    return hanging


def _told(exitcode: int, error: Path) -> str:
    """What went wrong in a process, or nothing."""
    if not exitcode:
        return ""
    return f"ended with {exitcode}:\n{error.read_text() if error.exists() else 'it has left no word'}"


def _run(
    rank: int, world: int, listener: socket.socket, work: Callable[..., Any], root: Path, arguments: tuple[Any, ...]
) -> None:
    port = listener.getsockname()[1]
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "TORCHELASTIC_RUN_ID": "test",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    error = root / f"error{rank}.txt"
    error.unlink(missing_ok=True)
    torch.set_num_threads(1)
    code = 1
    try:
        if rank == 0:
            _ = dist.TCPStore(
                "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
            )
        else:
            listener.close()
        torch.save(work(root, *arguments), root / f"rank{rank}.pt")
        if dist.is_initialized():
            dist.barrier()  # the first process keeps the others' meeting point
        code = 0
    except BaseException:
        error.write_text(traceback.format_exc())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
