"""``lightning-merge diff``: how far apart two sets are; see ``_diff``."""

import argparse

DESCRIPTION = "Say how far apart two sets of weights are, and where."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``diff``."""
    parser.add_argument("first", metavar="FILE[:SET]")
    parser.add_argument("second", metavar="FILE[:SET]", nargs="?")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge._commands._diff import diff

    print(diff(options.first, options.second))
    return 0
