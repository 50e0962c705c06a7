"""``lightning-merge unlearn``: a task subtracted from a stream's merged model."""

import argparse
from pathlib import Path

from lightning_merge._commands._needs import RECIPE_MODULES, need

DESCRIPTION = "Subtract a task's vector from a stream's merged model."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``unlearn``."""
    parser.add_argument("run", type=Path, help="folder of a `run continual/...` with `--merge.keep_vectors true`")
    parser.add_argument("--task", required=True, help="which one, as `task2`")
    parser.add_argument("--keep", type=float, default=0.95, help="share of their accuracy that the others must keep")
    parser.add_argument(
        "--projection",
        choices=("none", "ext-sub", "ethos"),
        default="none",
        help="goes on from the merge of the others, away from a part of the vector: what it does not share with them"
        " (`ext-sub`), or what is large along the singular vectors of their merge (`ethos`)",
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of that part (default 1)")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    need(RECIPE_MODULES)
    from lightning_merge.recipes.streams._unlearn import unlearn

    return 0 if unlearn(options.run, options.task, options.keep, options.projection, options.scale) else 1
