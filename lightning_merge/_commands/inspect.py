"""``lightning-merge inspect``: which weights are in a file; see ``_inspect``."""

import argparse

DESCRIPTION = "Say which weights a checkpoint file holds."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``inspect``."""
    parser.add_argument("file", help="a path, or a URL as s3://bucket/run/last.ckpt")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge._commands._inspect import describe

    print(describe(options.file))
    return 0
