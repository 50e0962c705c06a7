"""``lightning-merge verify``: a run's files measured again; see ``_verify``."""

import argparse
from pathlib import Path

from lightning_merge._commands._needs import CLI_MODULES, need

DESCRIPTION = "Measure a run's files again; exit 1 if one does not agree."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``verify``."""
    parser.add_argument("run", type=Path, help="a run folder, with config.yaml")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="share of a recorded value (default 0.0001)")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge._commands._verify import verify

    need(CLI_MODULES)
    text, agrees = verify(options.run, options.tolerance)
    print(text)
    return 0 if agrees else 1
