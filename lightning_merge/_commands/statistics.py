"""``lightning-merge statistics``: what ``ImportanceStatistics`` measures, of a checkpoint that is there already."""

import argparse
from pathlib import Path

DESCRIPTION = "Measure how much each weight of a checkpoint matters, for `soup --rule fisher` and its kin."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``statistics``."""
    parser.add_argument("file", help="a checkpoint, or FILE:SET for another of its sets")
    parser.add_argument(
        "--config", type=Path, required=True, help="config.yaml of the run, or a recipe's file: model and training data"
    )
    parser.add_argument(
        "--kind",
        choices=("fisher", "gram"),
        default="fisher",
        help="squared gradients of the loss of single samples, or Gram matrices of layers' inputs (default fisher)",
    )
    parser.add_argument("--samples", type=int, default=1024, help="first samples of the training loader (default 1024)")
    parser.add_argument(
        "--labels",
        choices=("true", "model"),
        default="true",
        help="of the data, or drawn by the model (default true)",
    )
    parser.add_argument("--out", type=Path, help="the file to write (default: KIND-statistics.safetensors beside FILE)")
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge._commands._needs import CLI_MODULES, need

    need(CLI_MODULES)
    from lightning_merge._commands._statistics import measure

    print(measure(options))
    return 0
