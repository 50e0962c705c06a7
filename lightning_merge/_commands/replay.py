"""``lightning-merge replay``: whether a run resumes bit for bit; see ``_replay``."""

import argparse

from lightning_merge._commands._needs import RECIPE_MODULES, need

DESCRIPTION = "Train a little, train it again from a file of the way in a new process, and name the first difference."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``replay``."""
    parser.add_argument("run", help="a run folder or its config.yaml, or the name of a recipe, as `digits/swa`")
    parser.add_argument("--epochs", type=int, default=4, help="epochs of the run, at least 2 (default 4)")
    parser.add_argument("--batches", type=int, default=8, help="batches of an epoch, at least 1 (default 8)")
    parser.add_argument("--epoch", type=int, help="the file is of its end, counted from 0 (default: the middle one)")
    parser.add_argument("--batch", type=int, help="or of this batch of it, counted from 0")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    need(RECIPE_MODULES)
    from lightning_merge._commands._replay import replay_config

    text, same = replay_config(options.run, options.epochs, options.batches, options.epoch, options.batch)
    print(text)
    return 0 if same else 1
