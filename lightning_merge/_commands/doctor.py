"""``lightning-merge doctor``: whether sets can be merged; see ``_doctor``."""

import argparse
from pathlib import Path

from lightning_merge._commands._needs import CLI_MODULES, need

DESCRIPTION = "Say whether sets of weights can be merged."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``doctor``."""
    parser.add_argument("files", metavar="FILE[:SET]", nargs="+")
    parser.add_argument("--config", type=Path, help="config.yaml of a run or a recipe: model and data to measure with")
    parser.add_argument("--base", metavar="FILE[:SET]", help="what all were fine-tuned from")
    parser.add_argument("--monitor", default="val/loss", help="the loss that validation logs (default val/loss)")
    parser.add_argument("--points", type=int, default=3, help="points on the line between two sets (default 3)")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge._commands._doctor import doctor

    if options.config is not None:
        need(CLI_MODULES)
    print(doctor(options.files, options.base, options.config, options.monitor, options.points))
    return 0
