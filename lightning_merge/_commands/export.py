"""``lightning-merge export``: one set as a file of its own; see ``_export``."""

import argparse

DESCRIPTION = "Write one set of weights of a checkpoint to a file of its own."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``export``."""
    parser.add_argument("file")
    parser.add_argument("out", help="ends in .safetensors, .pt, .pth or .bin; a path or a URL. With --hf a folder")
    parser.add_argument("--set", help="which set, as `inspect` names them; by default the one the score belongs to")
    parser.add_argument("--strip", default="", metavar="PREFIX", help="remove it from names; others are left out")
    parser.add_argument("--timm", metavar="ARCH", help="a model of timm that the weights must fit, as `resnet18`")
    parser.add_argument(
        "--hf", metavar="FOLDER", help="the model as `save_pretrained` wrote it: OUT is a folder like it"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing file")


def run(options: argparse.Namespace) -> int:
    """Runs it and gives the exit code."""
    from lightning_merge._commands._export import export
    from lightning_merge._commands._export_folder import export_folder

    if options.hf is not None:
        if options.timm is not None:
            raise ValueError("a model is one of timm or of transformers: give --timm or --hf, not both.")
        print(export_folder(options.file, options.out, options.set, options.strip, options.hf, options.force))
        return 0
    print(export(options.file, options.out, options.set, options.strip, options.timm, options.force))
    return 0
