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
    parser.add_argument(
        "--statistics",
        nargs="+",
        metavar="FILE",
        help="what `soup --rule fisher` and its kin would weigh the files by, one for each in their order",
    )
    parser.add_argument(
        "--widths",
        type=Path,
        metavar="FOLDER",
        help="of a file of PostHocEMA: write the loss by width, and the best, into a folder",
    )


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge._commands._doctor import doctor
    from lightning_merge._commands._widths import widths

    if options.config is not None:
        need(CLI_MODULES)
    if options.widths is not None:
        if len(options.files) != 1 or options.config is None or options.base is not None:
            raise ValueError(
                "`--widths FOLDER` measures the widths of one file: give FILE and `--config FILE`, no base."
            )
        print(widths(options.files[0], options.config, options.monitor, options.points, options.widths))
        return 0
    print(
        doctor(options.files, options.base, options.config, options.monitor, options.points, options.statistics or ())
    )
    return 0
