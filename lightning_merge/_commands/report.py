"""``lightning-merge report``: the reports of several runs over each other."""

import argparse
from pathlib import Path

DESCRIPTION = "Draw the reports of several runs over each other, on one page."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``report``."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", type=Path, help="a folder with a merge-report.html in or below it, or a page"
    )
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the page to write (default report.html)")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge._commands._report import overlay

    print(overlay(options.runs, options.out))
    return 0
