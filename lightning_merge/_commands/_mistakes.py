"""Which errors are mistakes of the user, and which are bugs."""

import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from signal import SIGTERM
from typing import Any


def users_mistake(error: Exception) -> str | None:
    """What to tell the user, if it was a mistake of theirs; ``None`` if it looks like a bug, which keeps its traceback.

    A mistake is an error that this package, Lightning, or a parser raised on purpose: its type is one of those used to
    report bad input, and the line that raised it is theirs rather than the user's.
    """
    for link in _chain(error):
        if _raised_in(link, "lightning_merge") and isinstance(link, (ValueError, TypeError, ImportError, OSError)):
            return str(link)
        if type(link).__name__ == "MisconfigurationException":
            return str(link)
        if _raised_in(link, "lightning") and isinstance(link, (FileNotFoundError, ImportError, RuntimeError)):
            return str(link)
        if type(link).__module__ == "omegaconf.errors":
            return str(link).partition("\n")[0]
        if str(link).startswith("Error(s) in loading state_dict"):
            return " ".join(line.strip() for line in str(link).splitlines()[:2])
    return None


def worker_was_told_to_end(error: Exception) -> bool:
    """Whether a worker of a loader died of SIGTERM.

    What goes to the whole process group, as from ``timeout``, SLURM or docker, reaches workers too, and torch reports
    their end before Lightning has ended the run.
    """
    if "DataLoader worker" not in str(error):
        return False
    trace = error.__traceback__
    while trace is not None:
        workers = getattr(trace.tb_frame.f_locals.get("self"), "_workers", None)
        if isinstance(workers, list) and any(getattr(each, "exitcode", None) == -SIGTERM for each in workers):
            return True
        trace = trace.tb_next
    return "killed by signal: Terminated" in str(error)


@contextmanager
def quiet_workers() -> Iterator[None]:
    """Within, a forked worker of a loader says nothing if the process that it hands a tensor to has been ended.

    A signal to the whole process group may break the connection off before the worker itself is told to end, and Python
    prints the traceback of the thread that serves it.
    """
    says = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        is_worker = multiprocessing.parent_process() is not None
        if not (is_worker and issubclass(kind, ConnectionError | EOFError)):
            says(kind, error, trace)

    sys.excepthook = hook
    try:
        yield
    finally:
        sys.excepthook = says


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _raised_in(error: BaseException, *packages: str) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] in packages
