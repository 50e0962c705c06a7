"""A merge that is written as a sharded checkpoint."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from lightning_merge._commands._combine_arguments import is_of_torchrun
from lightning_merge._commands._kept import is_plain
from lightning_merge._commands._target import save
from lightning_merge.files import KEY, read, replacing_folder
from lightning_merge.files._lazy import WhichWeights
from lightning_merge.files._sharded import META, PROVENANCE
from lightning_merge.trajectory import Trajectory
from lightning_merge.trajectory._sharded_output import save_parts


def write_folder(
    trajectory: Trajectory, provenance: dict[str, Any], whole: dict[str, Any], target: Path, processes: int
) -> list[str]:
    """Writes all of a sharded checkpoint, or leaves what was there.

    Args:
        trajectory: What is merged.
        provenance: Of it.
        whole: The same of all that it was made of, which is written.
        target: The folder.
        processes: How many of them do it.

    Returns:
        What of the last one's ``meta.pt`` is left out, since it is no plain data.
    """
    with _shared(target) as unfinished:
        if processes == 1:
            save_parts(trajectory, provenance["coefficients"], unfinished)
        else:
            _in_processes(trajectory, provenance, unfinished, processes)
        if not is_first():
            return []
        lost = _write_meta(trajectory[-1].path / META, unfinished / META)
        (unfinished / PROVENANCE).write_text(json.dumps(whole, indent=1), encoding="utf-8")
    return lost


def is_first() -> bool:
    """Whether this process speaks for all that ``torchrun`` has started, or is alone."""
    return not is_of_torchrun() or os.environ["RANK"] == "0"


@contextmanager
def _shared(target: Path) -> Iterator[Path]:
    """The folder to fill, of all processes that ``torchrun`` has started; the first one gives it its name."""
    if not is_of_torchrun():
        with replacing_folder(target) as unfinished:
            yield unfinished
        return
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        with replacing_folder(target) if is_first() else nullcontext() as own:
            path = [None if own is None else os.fspath(own)]
            dist.broadcast_object_list(path)
            yield Path(str(path[0]))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _write_meta(source: Path, target: Path) -> list[str]:
    """What the last checkpoint has beside its tensors, without averages: they are not of the merged weights."""
    if not source.exists():
        return []
    content = read(source, check=False)
    states = content.get("callbacks") or {}
    if not any(str(key).startswith(KEY) for key in (*content, *states)):
        shutil.copyfile(source, target)
        return []
    kept = {key: value for key, value in content.items() if not str(key).startswith(KEY)}
    kept["callbacks"] = {key: value for key, value in states.items() if not str(key).startswith(KEY)}
    lost = [str(key) for key, value in kept.items() if not is_plain(value)]
    save({key: value for key, value in kept.items() if str(key) not in lost}, target)
    return lost


def _in_processes(trajectory: Trajectory, provenance: dict[str, Any], folder: Path, processes: int) -> None:
    from torch.multiprocessing.spawn import start_processes

    paths = [os.fspath(checkpoint.path) for checkpoint in trajectory]
    with tempfile.TemporaryDirectory() as scratch:
        arguments = (processes, scratch, paths, provenance["weights"], provenance["coefficients"], os.fspath(folder))
        start: Callable[..., Any] = start_processes
        start(_work, arguments, processes, start_method="spawn")
        if (told := Path(scratch) / "error").exists():
            raise ValueError(told.read_text(encoding="utf-8"))


def _work(
    rank: int,
    processes: int,
    scratch: str,
    paths: Sequence[str],
    weights: WhichWeights,
    coefficients: Sequence[float],
    folder: str,
) -> None:
    """The share of one process; a mistake is left in a file, for its traceback says nothing to the user."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{scratch}/store", rank=rank, world_size=processes)
    try:
        save_parts(Trajectory.of_files(paths, weights), coefficients, folder)
    except ValueError as error:
        (Path(scratch) / "error").write_text(str(error), encoding="utf-8")
    finally:
        dist.destroy_process_group()
