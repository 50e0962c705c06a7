"""Scripts run as from a shell, but in a fork of this process, which has torch and Lightning imported: seconds each."""

import multiprocessing
import os
import runpy
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Script:
    """One that was started; what it prints goes to ``log``."""

    process: Any
    log: Path

    def finish(self, seconds: float = 300.0) -> tuple[int, str]:
        """Its exit code and all that it printed, errors too, once it has ended. It is killed if it takes longer."""
        self.process.join(seconds)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        return self.process.exitcode, self.log.read_text()


def start(path: Path, *options: object, folder: Path, log: str = "log.txt") -> Script:
    """Starts ``python path options...`` in a folder, where ``log`` is written too."""
    arguments = (path, [str(option) for option in options], folder, folder / log)
    process = multiprocessing.get_context("fork").Process(target=_run, args=arguments)
    process.start()
    return Script(process, folder / log)


def _run(path: Path, options: list[str], folder: Path, log: Path) -> None:
    with log.open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")  # pytest has put its own in their place
    os.chdir(folder)
    sys.argv, sys.path[0] = [str(path), *options], str(path.parent)
    code = 1
    try:
        runpy.run_path(str(path), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # and not the rest of the tests
