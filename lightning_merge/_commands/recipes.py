"""``lightning-merge recipes``: the bundled recipes, or one of them."""

import argparse

DESCRIPTION = "List the bundled recipes, or print one."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``recipes``."""
    parser.add_argument("name", nargs="?", help="the recipe to print, as `digits/swa`")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge.recipes._catalog import recipes, summary, whole

    if options.name is not None:
        print(whole(options.name), end="")
        return 0
    found = recipes()
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:{width}}  {summary(path)}")
    print("\nRun one: lightning-merge run NAME")
    return 0
