"""Whether anybody reads what a command prints."""

import os
import select
import sys

CLOSED = 128 + 13
"""Exit code of a command whose output nobody reads to the end, as by SIGPIPE."""


def reader_is_gone() -> bool:
    """Whether what is printed goes nowhere any more, as after ``| head``; nothing further is printed then."""
    try:
        sys.stdout.flush()
        if not _has_no_reader():  # what is not buffered has failed before
            return False
    except BrokenPipeError:
        pass
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its own end
    return True


def _has_no_reader() -> bool:
    if not hasattr(select, "poll"):
        return False
    asked = select.poll()
    asked.register(sys.stdout, 0)
    return any(found & select.POLLERR for _, found in asked.poll(0))
