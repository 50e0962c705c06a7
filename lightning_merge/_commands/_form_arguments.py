"""The arguments of ``soup`` for weights of a form of their own: adapters of peft, and pruned models."""

import argparse
from collections.abc import Sequence
from pathlib import Path


def add_forms(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument(
        "--rank",
        type=int,
        metavar="N",
        help="for folders of LoRA adapters: rank of the result (default: theirs, which then has to be the same)",
    )
    parser.add_argument(
        "--masks",
        choices=("keep", "intersect"),
        help="for pruned models: zeros have to be the same in all files, or what is zero in one is in the merge",
    )


def check_forms(options: argparse.Namespace, linear: bool) -> None:
    """Refuses what does not fit together.

    Args:
        options: Of ``soup``, for files that are no adapters.
        linear: Whether the rule is a sum of the files' weights.

    Raises:
        ValueError: Naming the argument and the cure.
    """
    from lightning_merge._commands._target import folder_of

    if options.rank is not None:
        raise ValueError(f"`--rank` must be left out: {options.files[0]} is no folder of an adapter.")
    if options.masks is not None and not linear:
        raise ValueError(
            f"`--masks` needs a rule that adds up weights, as `uniform` or `greedy`, got `--rule {options.rule}`: what"
            " is added to a base has no zeros of the files."
        )
    if options.masks == "intersect" and folder_of(options.out) is not None:
        raise ValueError("`--masks intersect` is written to a file, not to a folder: let `--out` end in .ckpt or .pt.")


def adapter_folders(files: Sequence[Path]) -> list[Path]:
    """The files, if all are folders of adapters.

    Raises:
        ValueError: If some are and others are not.
    """
    found = [file for file in files if (file / "adapter_config.json").is_file()]
    if found and len(found) < len(files):
        other = next(file for file in files if file not in found)
        raise ValueError(f"{found[0]} is a folder of an adapter and {other} is none: merge adapters with adapters.")
    return found
