"""The ``lightning-merge`` command.

``--help``, ``recipes`` and ``--version`` answer without loading torch; everything else is imported when it is needed.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from signal import SIGTERM

from lightning_merge import __version__
from lightning_merge._commands._combine import add_average, add_soup, combine

_TRAINER_COMMANDS = ("fit", "validate", "test", "predict")
_CLI_MODULES = ("jsonargparse", "docstring_parser", "typeshed_client")
_RECIPE_MODULES = (*_CLI_MODULES, "torchvision", "sklearn", "matplotlib", "rich")

_HELP = """\
commands:
  recipes [NAME]               list the bundled recipes, or print one: `lightning-merge recipes digits/swa > mine.yaml`
  run NAME [--option value]    train with a recipe, e.g. `lightning-merge run digits/swa --trainer.max_epochs 10`;
                               `--config FILE` and options override it, `--print_config` shows it,
                               `run NAME --help` lists all options
  run continual/NAME [--merge.preset PRESET]
                               train a stream of tasks and merge them; run again to go on after an interruption
  unlearn RUN --task TASK      subtract a task from a stream's merged model, if the other tasks keep their accuracy
  fit | validate | test | predict --config FILE [--option value]
                               LightningCLI with any model and data class; `lightning-merge fit --help`
  inspect FILE                 which weights are in a checkpoint, which of them its score belongs to, how to load it
  diff FILE[:SET] [FILE[:SET]] how far apart two sets of weights are, and where; of one file, its two sets
  export FILE OUT [--set SET]  one set as safetensors (OUT ends in .safetensors), a plain state dict (.pt) or for timm
  verify RUN                   measure a run's files again, and compare with the scores that they record
  doctor FILE... [--config FILE] [--base FILE]
                               whether sets of weights can be merged, with the figure that says so
  average RUN --out FILE [--rule RULE]
                               one run's checkpoints merged into one file: mean, window, ema, wsm-..., or searched for
                               the best score with `--config FILE`: greedy, lcsc, bayes
  soup FILE... --out FILE [--rule RULE]
                               checkpoints of several runs: uniform, greedy, diwa, learned, model-stock
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command. Gives 0, 2 for a user's mistake (a line or two say which), 130 for Ctrl-C, 143 for SIGTERM."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130
    except SystemExit as error:
        # Lightning turns Ctrl-C into exit code 1, after it has shut down.
        if isinstance(error.__context__, KeyboardInterrupt):
            return 130
        if type(error).__name__ == "SIGTERMException":  # Lightning's own, and without a code
            return _terminated(arguments)
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
    inspect.add_argument("file", help="a path, or a URL as s3://bucket/run/last.ckpt")

    diff = commands.add_parser("diff", description="Say how far apart two sets of weights are, and where.")
    diff.add_argument("first", metavar="FILE[:SET]")
    diff.add_argument("second", metavar="FILE[:SET]", nargs="?")
    export = commands.add_parser("export", description="Write one set of weights of a checkpoint to a file of its own.")
    export.add_argument("file")
    export.add_argument("out", help="ends in .safetensors, .pt, .pth or .bin; a path or a URL")
    export.add_argument("--set", help="which set, as `inspect` names them; by default the one the score belongs to")
    export.add_argument("--strip", default="", metavar="PREFIX", help="remove it from names; others are left out")
    export.add_argument("--timm", metavar="ARCH", help="a model of timm that the weights must fit, as `resnet18`")
    export.add_argument("--force", action="store_true", help="replace an existing file")
    verify = commands.add_parser("verify", description="Measure a run's files again; exit 1 if one does not agree.")
    verify.add_argument("run", type=Path, help="a run folder, with config.yaml")
    verify.add_argument("--tolerance", type=float, default=1e-4, help="share of a recorded value (default 0.0001)")
    doctor = commands.add_parser("doctor", description="Say whether sets of weights can be merged.")
    doctor.add_argument("files", metavar="FILE[:SET]", nargs="+")
    doctor.add_argument("--config", type=Path, help="config.yaml of a run or a recipe: model and data to measure with")
    doctor.add_argument("--base", metavar="FILE[:SET]", help="what all were fine-tuned from")
    doctor.add_argument("--monitor", default="val/loss", help="the loss that validation logs (default val/loss)")
    doctor.add_argument("--points", type=int, default=3, help="points on the line between two sets (default 3)")

    add_average(commands.add_parser("average", description="Merge the checkpoints of one run into one file."))
    add_soup(commands.add_parser("soup", description="Merge checkpoints of several runs into one file."))
    unlearn = commands.add_parser("unlearn", description="Subtract a task's vector from a stream's merged model.")
    unlearn.add_argument("run", type=Path, help="folder of a `run continual/...` with `--merge.keep_vectors true`")
    unlearn.add_argument("--task", required=True, help="which one, as `task2`")
    unlearn.add_argument("--keep", type=float, default=0.95, help="share of their accuracy that the others must keep")

    options = parser.parse_args(arguments)
    if options.command == "recipes":
        _recipes(options.name)
    elif options.command == "diff":
        from lightning_merge._commands._diff import diff as compare

        print(compare(options.first, options.second))
    elif options.command == "export":
        from lightning_merge._commands._export import export as write

        print(write(options.file, options.out, options.set, options.strip, options.timm, options.force))
    elif options.command == "verify":
        return _verify(options.run, options.tolerance)
    elif options.command == "unlearn":
        _need(_RECIPE_MODULES)
        from lightning_merge.recipes.streams._command import unlearn as forget

        return 0 if forget(options.run, options.task, options.keep) else 1
    elif options.command == "doctor":
        from lightning_merge._commands._doctor import doctor as examine

        if options.config is not None:
            _need(_CLI_MODULES)
        print(examine(options.files, options.base, options.config, options.monitor, options.points))
    elif options.command in ("average", "soup"):
        if options.config is not None:
            _need(_CLI_MODULES)
        print(combine(options))
    elif options.command == "inspect":
        from lightning_merge._commands._inspect import describe

        print(describe(options.file))
    else:
        parser.print_help()
    return 0


def _recipes(name: str | None) -> None:
    from lightning_merge.recipes._catalog import recipes, summary, whole

    if name is not None:
        print(whole(name), end="")
        return
    found = recipes()
    width = max(map(len, found))
    for name, path in found.items():
        print(f"{name:{width}}  {summary(path)}")
    print("\nRun one: lightning-merge run NAME")


def _run(arguments: list[str]) -> int:
    from lightning_merge.recipes._catalog import recipes, whole

    if arguments and arguments[0] in ("-h", "--help"):
        print(f"usage: lightning-merge run NAME [--option value]\n\nNAME is one of: {', '.join(recipes())}")
        print("All options of one: lightning-merge run NAME --help")
        return 0
    if not arguments or arguments[0].startswith("-"):
        return _fail(f"`run` needs the name of a recipe first: {', '.join(recipes())}.")
    config = whole(arguments[0])  # `--config` takes a text as well as a file
    if arguments[0].startswith("continual/"):
        _need(_RECIPE_MODULES)
        from lightning_merge.recipes.streams._command import run as run_stream

        run_stream(["--config", config, *arguments[1:]])
        return 0
    return _lightning(["fit", "--config", config, *arguments[1:]], _RECIPE_MODULES)


def _verify(run: Path, tolerance: float) -> int:
    from lightning_merge._commands._verify import verify

    _need(_CLI_MODULES)
    text, agrees = verify(run, tolerance)
    print(text)
    return 0 if agrees else 1


def _need(modules: Sequence[str]) -> None:
    missing = [name for name in modules if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'not installed: {", ".join(missing)}. They come with the recipes:\npip install "lightning-merge[recipes]"'
        )


def _lightning(arguments: list[str], modules: Sequence[str]) -> int:
    _need(modules)
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


def _terminated(arguments: list[str]) -> int:
    stream = arguments[:1] == ["run"] and arguments[1].startswith("continual/")
    cure = "Run the same command again" if stream else "Add `--ckpt_path FILE` with a checkpoint of the run"
    print(f"lightning-merge: stopped by SIGTERM. {cure} to go on from where it was saved.", file=sys.stderr)
    return 128 + SIGTERM


def _fail(*lines: str) -> int:
    print(f"lightning-merge: error: {lines[0]}", *lines[1:], sep="\n", file=sys.stderr)
    return 2
