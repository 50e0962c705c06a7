"""The ``lightning-merge`` command.

``--help``, ``recipes`` and ``--version`` answer without loading torch; everything else is imported when it is needed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

from lightning_merge import __version__

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_CLI_MODULES = ("jsonargparse", "docstring_parser", "typeshed_client")
_RECIPE_MODULES = (*_CLI_MODULES, "torchvision", "sklearn", "matplotlib", "rich")

_HELP = """\
commands:
  recipes [NAME]               list the bundled recipes, or print one: `lightning-merge recipes digits/swa > mine.yaml`
  run NAME [--option value]    train with a recipe, e.g. `lightning-merge run digits/swa --trainer.max_epochs 10`;
                               `--config FILE` and options override it, `--print_config` shows it,
                               `run NAME --help` lists all options
  fit | validate | test | predict --config FILE [--option value]
                               LightningCLI with any model and data class; `lightning-merge fit --help`
  inspect FILE                 which weights are in a checkpoint, which of them its score belongs to, how to load it
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. The exit code: 0, 2 for a mistake of the user (a line or two say which), 130 for Ctrl-C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1, after it has shut down.
        if isinstance(error.__context__, KeyboardInterrupt):
            return 130
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        return _fail(str(error.code))
    except Exception as error:
        message = _users_mistake(error)
        if message is None:
            raise
        return _fail(message)


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command == "run":
        return _run(rest)
    if command in _TRAINER_COMMANDS:
        return _lightning(arguments, _CLI_MODULES)

    parser = argparse.ArgumentParser(
        prog="lightning-merge",
        description="Merge model weights during PyTorch Lightning training.",
        epilog=_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="lightning-merge [--help] [--version] COMMAND ...",
    )
    parser.add_argument("--version", action="version", version=f"lightning-merge {__version__}")
    commands = parser.add_subparsers(prog="lightning-merge", dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    for name in ("run", *_TRAINER_COMMANDS):
        commands.add_parser(name)
    listing = commands.add_parser("recipes", description="List the bundled recipes, or print one.")
    listing.add_argument("name", nargs="?", help="the recipe to print, as `digits/swa`")
    inspect = commands.add_parser("inspect", description="Say which weights a checkpoint file holds.")
    inspect.add_argument("file", type=Path)

    options = parser.parse_args(arguments)
    if options.command == "recipes":
        _recipes(options.name)
    elif options.command == "inspect":
        from lightning_merge._files import describe

        print(describe(options.file))
    else:
        parser.print_help()
    return 0


def _recipes(name: str | None) -> None:
    from lightning_merge.recipes._catalog import find, recipes, summary

    if name is not None:
        print(find(name).read_text(encoding="utf-8"), end="")
        return
    found = recipes()
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:{width}}  {summary(path)}")
    print("\nRun one: lightning-merge run NAME")


def _run(arguments: list[str]) -> int:
    from lightning_merge.recipes._catalog import find, recipes

    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: lightning-merge run NAME [--option value]\n\nNAME is one of: {', '.join(recipes())}")
        print("All options of one: lightning-merge run NAME --help")
        return 0
    if not arguments or arguments[0].startswith("-"):
        return _fail(f"`run` needs the name of a recipe first: {', '.join(recipes())}.")
    path = find(arguments[0])
    return _lightning(["fit", "--config", str(path), *arguments[1:]], _RECIPE_MODULES)


def _lightning(arguments: list[str], modules: Sequence[str]) -> int:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        return _fail(
            f"not installed: {', '.join(missing)}. They come with the recipes:",
            'pip install "lightning-merge[recipes]"',
        )
    from lightning_merge.recipes._lightning_cli import run

    run(arguments)
    return 0


def _users_mistake(error: Exception) -> str | None:
    """What to tell the user, if it was a mistake of theirs; ``None`` if it looks like a bug, which keeps its traceback.

    A mistake is an error that this package, Lightning, or a parser raised on purpose: its type is one of those used to
    report bad input, and the line that raised it is theirs rather than the user's.
    """
    for link in _chain(error):
        if _raised_in(link, "lightning_merge") and isinstance(link, (ValueError, TypeError, ImportError, OSError)):
            return str(link)
        if type(link).__name__ == "MisconfigurationException":
            return str(link)
        if _raised_in(link, "lightning") and isinstance(link, (FileNotFoundError, ImportError, RuntimeError)):
            return str(link)
        if type(link).__module__ == "omegaconf.errors":
            return str(link).partition("\n")[0]
        if str(link).startswith("Error(s) in loading state_dict"):
            return " ".join(line.strip() for line in str(link).splitlines()[:2])
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _raised_in(error: BaseException, *packages: str) -> bool:
    trace = error.__traceback__
    if trace is None:
        return False
    while trace.tb_next is not None:
        trace = trace.tb_next
    return str(trace.tb_frame.f_globals.get("__name__", "")).partition(".")[0] in packages


def _fail(*lines: str) -> int:
    print(f"lightning-merge: error: {lines[0]}", *lines[1:], sep="\n", file=sys.stderr)
    return 2
